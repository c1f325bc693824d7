// SPDX-License-Identifier: GPL-2.0-only
/*
 * pressure_drop - gives the front of its files when memory is short
 *
 * When to use: to see that it is asked, for whom, and that what it names goes first.
 * Limits: a test policy.
 */
#include "policy.bpf.h"

PAGECACHE_KNOB(u64, drop_pages, 0, "pages", 0, 1000000000,
	       "to give of each file; 0: what is wanted");
PAGECACHE_KNOB(u64, drop_start, 0, "pages", 0, 1000000000, "where that begins");
PAGECACHE_KNOB(u32, in_round, 0, "round", 0, 1, "the round in which it gives");

/* Read by the test. */
u64 asked, wanted, rounds, files, machine;
u64 cgroup_id;
s64 accepted;

PAGECACHE_PRESSURE(pressure_drop_pressure)
(struct pagecache_ctx *ctx, struct pagecache_pressure *want)
{
	asked++;
	wanted += want->pages;
	rounds |= 1ULL << (want->round & 31);
	files = want->files;
	if (ctx->kind == PAGECACHE_KIND_MACHINE)
		machine++;
	else
		cgroup_id = want->cgroup_id;
	if (want->round == in_round)
		accepted = pagecache_drop(ctx, drop_start, drop_pages ? drop_pages : want->pages);
}

PAGECACHE_POLICY(pressure_drop, .pressure = (void *)pressure_drop_pressure);
