/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * stream.bpf.h - finds readers that stream and keeps a growing window ahead of each.
 *
 * What the policy sequential is made of, and what others fall back to.
 *
 * A few accesses in order make a stream; from then on a window is kept ahead of it, with
 * readahead markers that tell where the reader has come to.  A marker that is reached before
 * its data has arrived means that the reader waits: the window doubles, until that no longer
 * makes the reader faster, which is what the device can take.  A model whose files have been
 * streamed to their ends is trusted: its next file starts with the window of the last.  So is a
 * consumer with a node hint: what it reads before it is found to stream would lie on its own node.
 */
#ifndef STREAM_BPF_H
#define STREAM_BPF_H

PAGECACHE_KNOB(u32, start_window_kib, 4096, "KiB", 64, 1048576, "first window of a new stream");
PAGECACHE_KNOB(u32, max_window_mib, 128, "MiB", 1, 4096, "largest window ahead of one reader");
PAGECACHE_KNOB(u32, budget_mib, 0, "MiB", 0, 1073741824,
	       "no prefetch while the governed files hold this much page cache; 0: no bound");
PAGECACHE_KNOB(u32, confirm_accesses, 3, "accesses", 1, 16, "accesses in order that make a stream");

#define STREAMS 8
#define TRUSTED 1 /* files of a model streamed to the end before it is trusted */
#define STEEP_BYTES (32 << 20) /* windows below this grow fourfold, without being judged */
#define NOW_PAGES 64 /* of a miss, before the rest follows */
#define DOWN_PARTS 4 /* requests for the window below a reader that goes down */
#define HEAD_PAGES 64 /* a trusted file is expected to be read from here */

struct stream {
	u64 from; /* its last access began here, */
	u64 next; /* and the next one should be here */
	u64 ahead; /* asked for up to here, */
	u64 low; /* and from here on */
	u64 window; /* pages; 0: not a stream yet */
	u64 since_ns; /* the window has been what it is since then, */
	u64 since; /* when the reader was here, */
	u64 rate; /* and before that it did so many pages a second */
	u32 run; /* accesses in order */
	u32 settled; /* a larger window would not help */
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
	u32 reserved;
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
 * kernel's own readahead has left for it: random readers meet their neighbourhoods, too.  In a
 * mapping it may go down, by what the kernel reads around a fault: glibc's memcpy() copies from the
 * end where source and destination lie alike in their pages.
 */
static __always_inline bool goes_on(const struct stream *s, const struct pagecache_ctx *ctx)
{
	u64 slack = min_u64(ctx->ra_pages, 64);

	if (!s->run)
		return false;
	if (s->window)
		return ctx->index + s->window + slack >= s->from && ctx->index <= s->ahead + slack;
	if (is_marker(ctx))
		return ctx->index >= s->from &&
		       ctx->index <= s->next + max_u64(ctx->ra_pages, ctx->io_pages);
	if (is_fault(ctx) && ctx->index < s->from)
		return ctx->index + ctx->ra_pages + 1 >= s->from;
	return ctx->index + 1 >= s->next && ctx->index <= s->next + 1;
}

/*
 * The number as it is, but not as the verifier knows it: it would go through what follows once for
 * each value.
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

static __always_inline struct stream *stream_new(struct file_state *file,
						 const struct pagecache_ctx *ctx)
{
	struct stream *s = &file->streams[file->victim++ % STREAMS];

	*s = (struct stream){
		.from = ctx->index,
		.next = ctx->index + ctx->nr,
		.ahead = ctx->index + kernel_reads(ctx),
		.low = ctx->index,
		.run = 1,
	};
	return s;
}

static __always_inline void open_window(struct stream *s, const struct pagecache_ctx *ctx,
					u64 pages)
{
	s->window = min_u64(pages, largest_window(ctx));
	s->since = ctx->index;
	s->since_ns = ctx->time_ns;
}

/*
 * The reader had to wait.  Judge the present window once it has been read through: while each
 * growth makes the reader faster by an eighth or more, grow it again.
 */
PAGECACHE_STEP int grow(struct stream *s, const struct pagecache_ctx *ctx)
{
	u64 limit, pages, ns, rate;
	bool steep;

	if (!s || !ctx)
		return 0;
	limit = largest_window(ctx);
	pages = ctx->index - s->since;
	ns = ctx->time_ns - s->since_ns;
	steep = s->window < pages_of(ctx, STEEP_BYTES);
	if (s->settled || s->window >= limit || ctx->index < s->since + s->window || !ns)
		return 0;
	rate = pages * 1000000000ULL / ns;
	if (!steep && s->rate && rate < s->rate + s->rate / 8) {
		s->settled = 1;
		return 0;
	}
	s->rate = rate;
	open_window(s, ctx, s->window * (steep ? 4 : 2));
	return 0;
}

/*
 * The page is absent, though it was asked for, and nothing is on its way: what was read has been
 * dropped since, and the reader goes through it again.
 */
static __always_inline bool starts_again(const struct stream *s, const struct pagecache_ctx *ctx)
{
	return s->window && !is_marker(ctx) && ctx->index >= s->low && ctx->index < s->ahead &&
	       !ctx->inflight_pages;
}

static __always_inline void trust(const struct pagecache_ctx *ctx, const struct stream *s)
{
	struct model_state *model = model_of(ctx);

	if (!model)
		return;
	model->window = s->window;
	if (model->streamed < TRUSTED)
		model->streamed++;
}

/* The window that a new stream has at once; 0: it has to show first that it is one. */
static __always_inline u64 first_window(const struct pagecache_ctx *ctx,
					const struct model_state *model)
{
	if (model && model->streamed >= TRUSTED)
		return model->window;
	if (model && !is_marker(ctx) && consumer_is_known(ctx->tgid))
		return pages_of(ctx, (u64)start_window_kib << 10);
	return 0;
}

static __always_inline u64 room_in_budget(const struct pagecache_ctx *ctx)
{
	u64 budget = pages_of(ctx, (u64)budget_mib << 20);
	u64 used = ctx->governed_pages + ctx->inflight_pages;

	if (!budget)
		return ~0ULL;
	return used < budget ? budget - used : 0;
}

/* Markers lie a quarter of the window apart. */
static __always_inline u64 mark_step(u64 window)
{
	return min_u64(max_u64(window / 4, 16), 512);
}

/* The window reaches beyond the end of the file: into the next one, if this model is streamed. */
static __noinline int go_on(struct pagecache_ctx *ctx, u64 window, u64 room)
{
	struct pagecache_file_key next;
	u64 pages = pagecache_next_file(ctx, &next), left = ctx->file_pages - ctx->index;
	struct model_state *model = pages ? model_of(ctx) : NULL;
	u64 want, head, step = mark_step(window);
	s64 accepted;

	if (!model || model->streamed < TRUSTED || window <= left)
		return 0;
	want = min_u64(window - left, pages);
	if (want < pages)
		want &= ~(pages_of(ctx, PAGECACHE_HUGE_BYTES) - 1);
	head = pagecache_same_file(&model->next, &next) ? model->head : 0;
	if (want <= head || (want - head < step && want < pages))
		return 0;
	accepted = pagecache_prefetch_next(ctx, head, min_u64(want - head, room),
					   PAGECACHE_NODE_ANY, step);
	if (accepted <= 0)
		return 0;
	model->next = next;
	model->head = head + accepted;
	return 0;
}

/* Ask for what is missing of the window. */
static __always_inline void top_up(struct pagecache_ctx *ctx, struct stream *s, u64 room)
{
	u64 end = min_u64(ctx->index + s->window, ctx->file_pages);
	u64 step = mark_step(s->window);
	u64 huge = pages_of(ctx, PAGECACHE_HUGE_BYTES);
	s64 accepted;

	if (s->ahead < ctx->index)
		s->ahead = ctx->index;
	/* A part of a huge page cannot become one. */
	if (end < ctx->file_pages && s->window >= 2 * huge)
		end &= ~(huge - 1);
	/* Small pieces would only make small requests of the device. */
	if (s->ahead >= end || (end - s->ahead < step && end < ctx->file_pages))
		return;
	accepted = pagecache_prefetch(ctx, s->ahead, min_u64(end - s->ahead, room),
				      PAGECACHE_NODE_ANY, step);
	if (accepted <= 0)
		return;
	s->ahead += accepted;
	if (s->ahead >= ctx->file_pages)
		trust(ctx, s);
}

/* The last NOW_PAGES up to the page, unless that was asked for: then there is little to wait for.
 */
static __always_inline void answer_down(const struct pagecache_ctx *ctx, struct stream *s,
					struct pagecache_answer *answer)
{
	answer->start = ctx->index;
	if (ctx->index <= s->low) {
		answer->start -= min_u64(ctx->index, NOW_PAGES - 1);
		s->low = answer->start;
	}
	answer->nr = ctx->index + ctx->nr - answer->start;
}

/*
 * The reader goes down through a range: what is missing of the window below it, the nearest part
 * first.  Where the range begins is not known; what lies before it has been read.
 */
static __noinline int go_down(struct pagecache_ctx *ctx, struct stream *s, u64 room)
{
	u64 limit = largest_window(ctx), low, part;

	if (!s)
		return 0;
	low = ctx->index > s->window ? ctx->index - s->window : 0;
	part = max_u64(s->window / DOWN_PARTS, 16);
	if (low + part > s->low && low)
		return 0;
	for (int i = 0; i < DOWN_PARTS && s->low > low; i++) {
		u64 start = s->low > low + part ? s->low - part : low, nr = s->low - start;

		if (nr > room || pagecache_prefetch(ctx, start, nr, PAGECACHE_NODE_ANY,
						    mark_step(s->window)) < (s64)nr)
			return 0;
		room -= nr;
		s->low = start;
	}
	s->window = min_u64(2 * s->window, limit);
	return 0;
}

static __always_inline s32 stream_readahead(struct pagecache_ctx *ctx,
					    struct pagecache_answer *answer)
{
	struct file_state *file = file_of(ctx);
	struct model_state *model;
	struct stream *s;
	bool down = false;
	u64 room, window, head = 0;

	if (!file)
		return PAGECACHE_DEFAULT;
	s = stream_at(file, ctx);
	if (!s) {
		model = is_marker(ctx) || ctx->index < HEAD_PAGES ? model_of(ctx) : NULL;
		/* A marker may lie in what this reader's window has reached of its next file. */
		if (is_marker(ctx) && model && pagecache_is_file(ctx, &model->next))
			head = model->head;
		if (is_marker(ctx) && ctx->index >= head)
			return PAGECACHE_DEFAULT;
		s = stream_new(file, ctx);
		window = first_window(ctx, model);
		if (window) {
			open_window(s, ctx, window);
			s->ahead = max_u64(s->ahead, head);
			model->head = 0; /* its reader may come again */
		}
	} else {
		if (starts_again(s, ctx)) {
			s->ahead = ctx->index;
			open_window(s, ctx, s->window);
		}
		s->run++;
		down = is_fault(ctx) && ctx->index < s->from;
		if (ctx->index < s->low)
			s->low = ctx->index;
		s->from = ctx->index;
		s->next = ctx->index + (is_marker(ctx) ? 0 : ctx->nr);
	}
	if (!s->window) {
		if (s->run < confirm_accesses) {
			s->ahead = max_u64(s->ahead, ctx->index + kernel_reads(ctx));
			return PAGECACHE_DEFAULT;
		}
		open_window(s, ctx, pages_of(ctx, (u64)start_window_kib << 10));
	}
	room = room_in_budget(ctx);
	if (!room)
		return PAGECACHE_DEFAULT;
	/* The reader needs what is answered now, the rest can follow. */
	if (down) {
		if (!is_marker(ctx))
			answer_down(ctx, s, answer);
		go_down(ctx, s, room);
		return PAGECACHE_OVERRIDE;
	}
	if (!is_marker(ctx) || (ctx->flags & PAGECACHE_F_LATE))
		grow(s, ctx);
	if (!is_marker(ctx)) {
		answer->start = ctx->index;
		answer->nr = min_u64(max_u64(ctx->nr, NOW_PAGES), s->window);
		s->ahead = max_u64(s->ahead, ctx->index + answer->nr);
	}
	top_up(ctx, s, room);
	if (s->ahead >= ctx->file_pages)
		go_on(ctx, s->window, room);
	return PAGECACHE_OVERRIDE;
}

#endif /* STREAM_BPF_H */
