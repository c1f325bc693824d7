// SPDX-License-Identifier: GPL-2.0-only
/* exits.c - how the last policies ended, kept after they are gone. */
#include <linux/timekeeping.h>

#include "pagecache.h"

#define PCB_EXITS 64

static struct pagecache_exit_record pcb_exits[PCB_EXITS];
static u64 pcb_exit_seq;

/* Under pcb_mutex. */
void pcb_exit_push(struct pagecache_exit_record *record)
{
	record->seq = ++pcb_exit_seq;
	record->time_ns = ktime_get_real_ns();
	pcb_exits[record->seq % PCB_EXITS] = *record;
	pr_info("policy %s ended: %s%s%s\n", record->policy, record->reason,
		record->message[0] ? ": " : "", record->message);
}

/* The oldest record kept whose seq is larger than record->seq.  Under pcb_mutex. */
int pcb_exit_next(struct pagecache_exit_record *record)
{
	u64 oldest = pcb_exit_seq > PCB_EXITS ? pcb_exit_seq - PCB_EXITS + 1 : 1;
	u64 seq = max(record->seq + 1, oldest);

	if (seq > pcb_exit_seq || !seq)
		return -ENOENT;
	*record = pcb_exits[seq % PCB_EXITS];
	return 0;
}
