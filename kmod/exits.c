// SPDX-License-Identifier: GPL-2.0-only
/* exits.c - how the last policies ended, kept after they are gone. */
#include <linux/timekeeping.h>

#include "policy.h"

#define PCB_EXITS 64

static struct pagecache_exit_record pcb_exits[PCB_EXITS];
static u64 pcb_exit_seq;

/* The kernel's text of how a policy ended; seq and time follow when it is pushed. */
void pcb_exit_record(struct pagecache_exit_record *record, const char *policy,
		     enum pagecache_exit_kind kind, s64 code, enum pagecache_hook hook,
		     const char *reason, const char *message)
{
	*record = (struct pagecache_exit_record){ .kind = kind, .code = code, .hook = hook };
	strscpy(record->policy, policy, sizeof(record->policy));
	strscpy(record->reason, reason, sizeof(record->reason));
	strscpy(record->message, message ?: "", sizeof(record->message));
}

void pcb_exit_push(struct pagecache_exit_record *record)
{
	lockdep_assert_held(&pcb_mutex);
	record->seq = ++pcb_exit_seq;
	record->time_ns = ktime_get_real_ns();
	pcb_exits[record->seq % PCB_EXITS] = *record;
	pr_info("policy %s ended: %s%s%s\n", record->policy, record->reason,
		record->message[0] ? ": " : "", record->message);
}

/* The oldest record kept whose seq is larger than record->seq. */
int pcb_exit_next(struct pagecache_exit_record *record)
{
	u64 oldest = pcb_exit_seq > PCB_EXITS ? pcb_exit_seq - PCB_EXITS + 1 : 1;
	u64 seq = max(record->seq + 1, oldest);

	lockdep_assert_held(&pcb_mutex);
	if (seq > pcb_exit_seq || !seq)
		return -ENOENT;
	*record = pcb_exits[seq % PCB_EXITS];
	return 0;
}
