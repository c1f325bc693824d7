/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * stream_find.bpf.h - what is remembered of readers that stream, and which stream an access is of.
 *
 * Up to 8 streams of each file are followed at a time, in a map by file; of each model it is known
 * how its last file was streamed.  stream.bpf.h decides about their windows.
 */
#ifndef STREAM_FIND_BPF_H
#define STREAM_FIND_BPF_H

#include "policy.bpf.h"

PAGECACHE_KNOB(u32, start_window_kib, 4096, "KiB", 64, 1048576, "first window of a new stream");
PAGECACHE_KNOB(u32, max_window_mib, 128, "MiB", 1, 4096, "largest window ahead of one reader");
PAGECACHE_KNOB(u32, budget_mib, 0, "MiB", 0, 1073741824,
	       "no prefetch while the governed files hold this much page cache; 0: no bound");
PAGECACHE_KNOB(u32, confirm_accesses, 3, "accesses", 1, 16, "accesses in order that make a stream");

#define STREAMS 8
#define TRUSTED 1 /* files of a model streamed to the end before it is trusted */
#define STEEP_BYTES (32 << 20) /* windows below this grow fourfold, and are not measured */
#define PROBE_BYTES (1ULL << 30) /* read on with a window before a larger one is tried again */
#define NOW_BYTES (256 << 10) /* of a miss, before the rest follows */
#define CONFIRM_BYTES (256 << 10) /* in order: more than a record */
#define NEAR_BYTES (256 << 10) /* what is no farther from the next page is in order, too */
#define READ_PART 4 /* of what a reader comes through it reads this part at least, */
#define SEEN_PART 64 /* and of a mapping this part is seen to be touched, */
#define SEEN_BYTES (32 << 20) /* by one that has come so far, past a chunk in small folios */
#define JUMPS 3 /* so many accesses of a mapping that do not go on are no stream's */
#define LEAST_STEP_BYTES (64 << 10) /* from one marker to the next, */
#define SMALL_STEP_BYTES (2 << 20) /* and up to this in a small window, */
#define MOST_STEP_BYTES (8 << 20) /* or this in a large one */
#define DOWN_PARTS 4 /* requests for the window below a reader that goes down */
#define HEAD_BYTES (256 << 10) /* a trusted file is expected to be read from here */

/* A larger window may help; it did not; it is being tried again. */
enum settled { GROWING = 0, SETTLED = 1, PROBING = 2 };

struct stream {
	u64 from; /* its last access began here, */
	u64 next; /* and the next one should be here */
	u64 ahead; /* asked for up to here, */
	u64 low; /* and from here on */
	u64 window; /* pages; 0: not a stream yet */
	u64 since_ns; /* the window has been what it is since then, */
	u64 since; /* when the reader was here, */
	u64 rate; /* and before that it did so many pages a second */
	u64 moved; /* pages that it has come to in order */
	u64 touched; /* what the reader had accessed when this counter was 0 */
	u64 goal; /* the window grows up to this as the reader goes on, whether it waits or not */
	u32 run; /* accesses in order that came to pages not accessed before */
	u32 settled; /* whether a larger window would help: enum settled */
	u32 jumped; /* accesses of a mapping, the last ones, that did not go on in order */
	u32 place; /* where others find it: stream_passed.bpf.h */
	u32 begun; /* streams that had begun in its model when it was here last */
	u32 reserved;
	u64 began_ns; /* when it got that place; 0: it has none */
	u64 proven; /* the window before it was grown to see whether that helps now */
};

struct file_state {
	struct stream streams[STREAMS];
	u32 victim;
	u32 reserved;
};

struct file_key {
	u64 ino;
	u64 file_id;
	u32 dev_major;
	u32 dev_minor;
};

struct model_state {
	u64 window;
	u64 head; /* pages asked for of the file that comes next, */
	struct pagecache_file_key next; /* which is this one */
	u32 streamed;
	u32 begun; /* streams, in all its files */
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, struct file_key);
	__type(value, struct file_state);
} files SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1024);
	__type(key, u32);
	__type(value, struct model_state);
} models SEC(".maps");

static const struct file_state no_file;
static const struct model_state no_model;

static __always_inline struct file_state *file_of(const struct pagecache_ctx *ctx)
{
	struct file_key key = {
		.ino = ctx->ino,
		.file_id = ctx->file_id,
		.dev_major = ctx->dev_major,
		.dev_minor = ctx->dev_minor,
	};
	struct file_state *file = bpf_map_lookup_elem(&files, &key);

	if (file)
		return file;
	bpf_map_update_elem(&files, &key, &no_file, BPF_NOEXIST);
	return bpf_map_lookup_elem(&files, &key);
}

static __always_inline struct model_state *model_of(const struct pagecache_ctx *ctx)
{
	u32 key = ctx->model;
	struct model_state *model = bpf_map_lookup_elem(&models, &key);

	if (model)
		return model;
	bpf_map_update_elem(&models, &key, &no_model, BPF_NOEXIST);
	return bpf_map_lookup_elem(&models, &key);
}

static __always_inline u64 largest_window(const struct pagecache_ctx *ctx)
{
	return min_u64(pages_of(ctx, (u64)max_window_mib << 20), pagecache_cgroup_share(ctx));
}

/* At least so much of an access is read by the kernel's own readahead. */
static __always_inline u64 kernel_reads(const struct pagecache_ctx *ctx)
{
	return min_u64(ctx->nr, max_u64(ctx->ra_pages, ctx->io_pages));
}

/* So far from where a stream is expected next it still goes on. */
static __always_inline u64 near_pages(const struct pagecache_ctx *ctx)
{
	return min_u64(ctx->ra_pages, pages_of(ctx, NEAR_BYTES));
}

static __always_inline bool is_fault(const struct pagecache_ctx *ctx)
{
	return ctx->kind == PAGECACHE_KIND_FAULT || ctx->kind == PAGECACHE_KIND_FAULT_MARKER;
}

static __always_inline bool is_marker(const struct pagecache_ctx *ctx)
{
	return ctx->kind == PAGECACHE_KIND_MARKER || ctx->kind == PAGECACHE_KIND_FAULT_MARKER;
}

/*
 * Whether this access goes on with a stream: in its window, shortly behind its end, or up to a
 * window back, since memcpy() from a mapping touches the last page of a range before the pages on
 * the way.  As long as it is not one yet, only the very next page will do, or the marker that the
 * kernel's own readahead has left for it: random readers meet their neighborhoods, too; and where
 * hits are told of, what it comes to again.  In a mapping it may go down, by what the kernel reads
 * around a fault: glibc's memcpy() copies from the end where source and destination lie alike in
 * their pages.
 */
static __always_inline bool goes_on(const struct stream *s, const struct pagecache_ctx *ctx)
{
	u64 slack = near_pages(ctx);

	if (!s->run)
		return false;
	if (s->window)
		return ctx->index + s->window + slack >= s->from && ctx->index <= s->ahead + slack;
	if (is_marker(ctx))
		return ctx->index >= s->from &&
		       ctx->index <= s->next + max_u64(ctx->ra_pages, ctx->io_pages);
	if (!PAGECACHE_TELLS_HITS) {
		if (is_fault(ctx) && ctx->index < s->from)
			return ctx->index + ctx->ra_pages + 1 >= s->from;
		return ctx->index + 1 >= s->next && ctx->index <= s->next + 1;
	}
	if (is_fault(ctx) && ctx->index < s->low)
		return ctx->index + slack + 1 >= s->low;
	/* Of a large folio, of what readahead reads at once, a fault can map all and tells of less.
	 */
	if (is_fault(ctx))
		slack = min_u64(ctx->ra_pages, pages_of(ctx, PAGECACHE_HUGE_BYTES));
	else
		slack = 1;
	return ctx->index >= s->low && ctx->index <= s->next + slack;
}

/*
 * Pages of this access that the stream had not come to before.  A fault is told of again when it is
 * tried again, and once more with what is mapped around it: that is one access.
 */
static __always_inline u64 moves_on(const struct stream *s, const struct pagecache_ctx *ctx)
{
	u64 end = ctx->index + (is_marker(ctx) ? 0 : ctx->nr);
	u64 up = end > s->next ? end - max_u64(s->next, ctx->index) : 0;

	if (is_marker(ctx) && ctx->index > s->next)
		up = ctx->index - s->next;
	return up + (ctx->index < s->low ? s->low - ctx->index : 0);
}

/*
 * Return the number itself, but hide its value from the verifier, which would otherwise go through
 * what follows once for each value that it may have.
 */
static __always_inline u64 any_number(const struct pagecache_ctx *ctx, u64 number)
{
	u64 now = ctx->time_ns, same = now;

	asm volatile("" : "+r"(same));
	return number + (same - now);
}

/* The number of the stream that this access goes on with; STREAMS: none. */
PAGECACHE_STEP u32 stream_find(const struct file_state *file, const struct pagecache_ctx *ctx)
{
	u32 found = STREAMS;

	if (!file || !ctx)
		return STREAMS;
	for (int i = 0; i < STREAMS; i++) {
		if (goes_on(&file->streams[i], ctx)) {
			found = i;
			break;
		}
	}
	return found;
}

static __always_inline struct stream *stream_at(struct file_state *file,
						const struct pagecache_ctx *ctx)
{
	u64 found = stream_find(file, ctx);

	if (found == STREAMS)
		return NULL;
	return &file->streams[any_number(ctx, found) % STREAMS];
}

/* Move the stream to the end of this access, which covers so many pages that are new to it. */
static __always_inline void count(struct stream *s, const struct pagecache_ctx *ctx, u64 moved)
{
	u64 end = ctx->index + (is_marker(ctx) ? 0 : ctx->nr);

	s->run += !PAGECACHE_TELLS_HITS || moved;
	if (!s->window)
		s->moved += moved;
	if (ctx->index < s->low)
		s->low = ctx->index;
	s->from = ctx->index;
	s->next = PAGECACHE_TELLS_HITS && !s->window ? max_u64(s->next, end) : end;
}

/*
 * Whether the reader has shown that it streams.  Misses in order are evidence enough; where every
 * access is reported, random ones are in order by chance too often.
 */
static __always_inline bool confirmed(const struct stream *s, const struct pagecache_ctx *ctx)
{
	return s->run >= confirm_accesses &&
	       (!PAGECACHE_TELLS_HITS || s->moved >= pages_of(ctx, CONFIRM_BYTES));
}

static __always_inline void begin(struct stream *s, struct pagecache_ctx *ctx)
{
	*s = (struct stream){
		.from = ctx->index,
		.next = ctx->index + ctx->nr,
		.ahead = ctx->index + kernel_reads(ctx),
		.low = ctx->index,
		.moved = ctx->nr,
		.touched = pagecache_touched(ctx) - ctx->nr,
		.run = 1,
	};
}

#endif /* STREAM_FIND_BPF_H */
