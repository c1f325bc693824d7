// SPDX-License-Identifier: GPL-2.0-only
/*
 * tracer - not a policy: counts the calls of folio_referenced(), as tracing tools do
 *
 * When to use: to see that it and the hook evict do not get into each other's way.
 * Limits: a test program.
 */
#include "policy.bpf.h"

u64 calls;

SEC("fentry/folio_referenced")
int count_calls(void *ctx)
{
	__sync_fetch_and_add(&calls, 1);
	return 0;
}
