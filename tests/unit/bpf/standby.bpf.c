// SPDX-License-Identifier: GPL-2.0-only
/*
 * standby.bpf.c - standby.bpf.h in an ordinary process, for tests/unit/test_standby.py.
 *
 * Maps are those of `simulate`; what engine agent would know of a reader and of its file is what
 * the test says.
 */
#include "policy.bpf.h"

#define PAGECACHE_ENGINE_AGENT

static struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16);
	__type(key, struct pagecache_file_key);
	__type(value, struct pagecache_agent_tag);
} tags SEC(".maps");

static u64 busy_ns, file_pages;
static u32 kind = PAGECACHE_KIND_READ;

static inline u64 pagecache_reader_busy_ns(void)
{
	return busy_ns;
}

#include "standby.bpf.h"

PAGECACHE_POLICY(standby, .readahead = NULL);

/* Say what the device of a file can do, in MiB a second; 0: nobody knows. */
void set_device_speed(u64 ino, u32 mib_s)
{
	struct pagecache_file_key key = { .ino = ino };
	struct pagecache_agent_tag tag = { .device_mib_s = mib_s };

	bpf_map_update_elem(&tags, &key, &tag, BPF_ANY);
}

/* Say on which node a process wants its pages. */
void set_node(u32 tgid, s32 node)
{
	struct consumer_key key = { tgid };
	struct consumer_hint hint = { node };

	bpf_map_update_elem(&consumers, &key, &hint, BPF_ANY);
}

/* Say how large every file is; 0: nobody asks. */
void set_file_pages(u64 pages)
{
	file_pages = pages;
}

/* Say that readers read, or that they touch a mapping. */
void set_mapped(int is_mapped)
{
	kind = is_mapped ? PAGECACHE_KIND_FAULT : PAGECACHE_KIND_READ;
}

/*
 * One access of a thread that has run for so long, to a file that has so much in the page cache;
 * followed in that file, or in an order of several (0).  Returns whether the reader is left alone.
 */
int is_left_alone(u32 model, u32 tgid, u32 tid, u64 ino, u64 followed, u64 index, u64 nr,
		  u64 now_ns, u64 ran_ns, u64 ra_pages, u64 resident_pages, u64 inflight_pages,
		  u64 window)
{
	struct pagecache_ctx ctx = {
		.model = model,
		.tgid = tgid,
		.tid = tid,
		.ino = ino,
		.index = index,
		.nr = nr,
		.kind = kind,
		.time_ns = now_ns,
		.page_shift = 12,
		.ra_pages = ra_pages,
		.file_pages = file_pages,
		.resident_pages = resident_pages,
		.inflight_pages = inflight_pages,
	};

	busy_ns = ran_ns;
	return stands_down(&ctx, followed, index, window);
}

/* Models of which status says that their files are short, or that they are left alone. */
u64 models_told(int short_ones)
{
	return short_ones ? short_files : standing_down;
}

/* The state of a reader (enum standby_state). */
int state_of(u32 model, u32 tgid)
{
	struct standby_key key = { .model = model, .tgid = tgid };
	struct standby *it = bpf_map_lookup_elem(&standby, &key);

	return it ? (int)it->state : -1;
}
