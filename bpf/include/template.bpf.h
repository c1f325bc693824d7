/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * template.bpf.h - the maps of I/O templates, and how a page is found in one.
 *
 * A policy that includes this is given templates: user space (pagecache_bpf/templates/layout.py)
 * makes the arrays as large as the templates need and maps them to write them.
 */
#ifndef TEMPLATE_BPF_H
#define TEMPLATE_BPF_H

#define TEMPLATE_ARRAY(name, type_, entries)                  \
	struct {                                              \
		__uint(type, BPF_MAP_TYPE_ARRAY);             \
		__uint(map_flags, 1024); /* BPF_F_MMAPABLE */ \
		__uint(max_entries, entries);                 \
		__type(key, u32);                             \
		__type(value, struct type_);                  \
	} name SEC(".maps")

TEMPLATE_ARRAY(template_models, pagecache_template_model, 64);
TEMPLATE_ARRAY(template_consumers, pagecache_template_consumer, 256);
TEMPLATE_ARRAY(template_targets, pagecache_template_target, 1024);
TEMPLATE_ARRAY(template_spans, pagecache_template_span, 4096);
TEMPLATE_ARRAY(template_index, pagecache_template_entry, 32768);
TEMPLATE_ARRAY(template_steps, pagecache_template_step, 32768);
TEMPLATE_ARRAY(template_extents, pagecache_template_extent, 16384);

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 131072);
	__uint(map_flags, 1); /* BPF_F_NO_PREALLOC */
	__type(key, struct pagecache_file_key);
	__type(value, struct pagecache_template_file);
} template_files SEC(".maps");

#define TEMPLATE_SEARCH 24 /* halvings: 16 million entries */

static __always_inline struct pagecache_template_file *
template_file_of(const struct pagecache_ctx *ctx)
{
	struct pagecache_file_key key = pagecache_key_of(ctx);

	return bpf_map_lookup_elem(&template_files, &key);
}

static __always_inline struct pagecache_template_step *template_step(u32 number)
{
	return bpf_map_lookup_elem(&template_steps, &number);
}

static __always_inline struct pagecache_template_extent *template_extent(u32 number)
{
	return bpf_map_lookup_elem(&template_extents, &number);
}

static __always_inline struct pagecache_template_extent *template_extent_of(u32 step)
{
	struct pagecache_template_step *s = template_step(step);

	return s ? template_extent(s->extent) : NULL;
}

static __always_inline struct pagecache_template_target *template_target(u32 number)
{
	return bpf_map_lookup_elem(&template_targets, &number);
}

/* Pages of an extent, from its start on, that have been asked for. */
static __always_inline u32 template_asked(const struct pagecache_template_extent *extent,
					  const struct pagecache_template_target *target)
{
	return extent->generation == target->generation ? extent->asked : 0;
}

static __always_inline bool template_touches(const struct pagecache_template_extent *extent,
					     u32 file, u64 index, u64 nr)
{
	return extent->file == file && index < extent->end && index + nr > extent->start;
}

/* A binary search: `found` is the last entry that does not begin behind the page. */
struct template_search {
	u32 page;
	u32 low;
	u32 nr;
	u32 found;
};

LOOP_STEP(template_halve, TEMPLATE_SEARCH, u32 i, struct template_search *search)
{
	u32 middle = search->low + search->nr / 2;
	struct pagecache_template_entry *entry;

	if (!search->nr)
		return 1;
	entry = bpf_map_lookup_elem(&template_index, &middle);
	if (!entry)
		return 1;
	if (entry->start <= search->page) {
		search->found = entry->step;
		search->low = middle + 1;
		search->nr -= search->nr / 2 + 1;
	} else {
		search->nr /= 2;
	}
	return 0;
}

/* The step of a span in which a page lies, or PAGECACHE_TEMPLATE_NONE. */
static __noinline u32 template_find(u32 span_number, u32 page)
{
	struct pagecache_template_span *span = bpf_map_lookup_elem(&template_spans, &span_number);
	struct template_search search = { .page = page, .found = PAGECACHE_TEMPLATE_NONE };
	struct pagecache_template_extent *extent;

	if (!span)
		return PAGECACHE_TEMPLATE_NONE;
	search.low = span->first;
	search.nr = span->nr;
	LOOP(template_halve, &search);
	extent = template_extent_of(search.found);
	return extent && page < extent->end ? search.found : PAGECACHE_TEMPLATE_NONE;
}

/*
 * The distance of two steps in the template, if it is their distance in the file as well: both lie
 * in one range then (a tensor, say), through which memcpy() may go down.  0: they do not.
 */
static __always_inline s64 template_gone(u32 from, u32 to)
{
	struct pagecache_template_step *a = template_step(from), *b = template_step(to);
	struct pagecache_template_extent *x, *y;
	s64 gone;

	x = a ? template_extent(a->extent) : NULL;
	y = b ? template_extent(b->extent) : NULL;
	if (!x || !y || x->file != y->file)
		return 0;
	gone = (s64)(b->before - a->before);
	return gone == (s64)y->start - (s64)x->start ? gone : 0;
}

/* Whether two steps read the same file; false also where one of them does not exist. */
static __always_inline bool template_same_file(u32 from, u32 to)
{
	struct pagecache_template_extent *x = template_extent_of(from);
	struct pagecache_template_extent *y = template_extent_of(to);

	return x && y && x->file == y->file;
}

/*
 * Which pages to ask for when pages of an extent are wanted.  A huge page is asked for as a whole
 * where consumers want all of it, and by just one of the extents that lie in it.  Returns the first
 * page in the lower half and the end in the upper half; both are equal where another extent brings
 * in all.  A global function, which the verifier goes through once.
 */
__noinline u64 template_range(u32 number, u32 start, u32 end, u32 huge)
{
	struct pagecache_template_extent *extent = template_extent(number), *other;
	struct pagecache_template_target *target;
	u64 from = start, to = end, mask = huge - 1;

	target = extent ? template_target(extent->file) : NULL;
	if (!target)
		return from | to << 32;
	if (start == extent->start) {
		other = template_extent(extent->before);
		if (other && template_asked(other, target) == other->end - other->start)
			from = (from + mask) & ~mask;
		else if (extent->edges & PAGECACHE_TEMPLATE_WHOLE_FIRST)
			from &= ~mask;
	}
	if (end == extent->end) {
		other = template_extent(extent->behind);
		if (other && template_asked(other, target))
			to &= ~mask;
		else if (extent->edges & PAGECACHE_TEMPLATE_WHOLE_LAST)
			to = (to + mask) & ~mask;
	}
	return (u32)from | to << 32;
}

#endif /* TEMPLATE_BPF_H */
