/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * observer_steps.bpf.h - how the observer's programs walk over the bits of a file's pages.
 *
 * The state of a walk lies in a map, with the task's: the verifier does not track numbers there, so
 * that it looks at a loop's body once and not once for each value that a sum may have.
 */
#ifndef OBSERVER_STEPS_BPF_H
#define OBSERVER_STEPS_BPF_H

#include "observer.bpf.h"

struct working {
	struct task_state *state;
};

static __always_inline struct walk *start_walk(struct task_state *state, u32 slot, u32 tid)
{
	struct walk *w = &state->walk;

	__builtin_memset(w, 0, sizeof(*w));
	w->slot = slot;
	w->tid = tid;
	return w;
}

/* Decide what the wanted pages of a word were; return how many of them, from the first, count. */
static __always_inline void classify(struct page_bits *bits, u32 at, u64 wanted, u64 added,
				     bool adder, struct found *found)
{
	u64 resident = bits->resident[at], fresh = bits->fresh[at] & added;
	u64 rest = wanted & resident & ~fresh, ours = rest & bits->ours[at];
	u64 gone = adder ? wanted : wanted & fresh;

	found->miss += count_bits(wanted & (fresh | ~resident));
	found->demand += count_bits(wanted & fresh);
	found->ours += count_bits(ours);
	found->hit += count_bits(ours | (rest & bits->touched[at]));
	found->ahead += count_bits(rest & ~ours & ~bits->touched[at]);
	__sync_fetch_and_or(&bits->touched[at], wanted);
	__sync_fetch_and_and(&bits->ours[at], ~ours);
	__sync_fetch_and_and(&bits->fresh[at], ~gone);
}

LOOP_STEP(step_read, MAX_WORDS, u32 step, struct working *c)
{
	struct walk *w = &c->state->walk;
	u64 word = w->word++, wanted = word_mask(word, w->from, w->to), absent;
	u32 at = word % BITS_WORDS;
	struct page_bits *bits;

	if (word * 64 >= w->to)
		return 1;
	bits = bits_of(w->slot, word / BITS_WORDS, false);
	if (!bits)
		return 1;
	/* What lies before index has been read, and the page there is being read. */
	absent = wanted & ~bits->resident[at] & ~word_mask(word, 0, w->index + 1);
	absent &= -absent;
	wanted &= absent - 1;
	classify(bits, at, wanted, word_mask(word, w->add_from, w->add_to), bits->adder == w->tid,
		 &w->found);
	w->stopped = word * 64 + count_bits(absent - 1); /* all 64 if none is */
	return absent != 0;
}

/* What a call has added behind what it wants was brought by readahead. */
LOOP_STEP(step_behind, MAX_WORDS, u32 step, struct working *c)
{
	struct walk *w = &c->state->walk;
	u64 word = w->word++, fresh;
	u32 at = word % BITS_WORDS;
	struct page_bits *bits;

	if (word * 64 >= w->to)
		return 1;
	bits = bits_of(w->slot, word / BITS_WORDS, false);
	if (!bits)
		return 0;
	fresh = bits->fresh[at] & word_mask(word, w->from, w->to);
	w->pages += count_bits(fresh);
	if (fresh)
		__sync_fetch_and_and(&bits->fresh[at], ~fresh);
	return 0;
}

/*
 * A read has got a batch of pages at index.  How many they are is not told; they are resident, so
 * at most the run of resident pages that starts there.  Absent ones will be seen when they come.
 */
static __always_inline void count_read(struct task_state *state, u64 call, u64 to)
{
	struct working working = { state };
	struct walk *w = &state->walk;

	w->from = state->counted;
	w->to = to;
	w->stopped = w->from;
	w->word = w->from / 64;
	if (state->add_slot == w->slot && state->add_call == call) {
		w->add_from = state->add_from;
		w->add_to = state->add_to;
	}
	LOOP(step_read, &working);
	state->counted = w->stopped < to ? w->stopped : to;
}

static __always_inline u64 count_behind(struct task_state *state, u64 end)
{
	struct working working = { state };
	struct walk *w = &state->walk;

	w->from = state->add_from > end ? state->add_from : end;
	w->to = state->add_to;
	w->word = w->from / 64;
	w->pages = 0;
	LOOP(step_behind, &working);
	state->add_to = end;
	return w->pages;
}

/* Looks at the first of the pages, and takes it off them. */
LOOP_STEP(step_transit, 64, u32 step, struct working *c)
{
	struct transit *t = &c->state->transit;
	u64 bit = t->pages & -t->pages, entry;

	if (!bit)
		return 1;
	t->pages ^= bit;
	entry = slot_of(t->leaf, count_bits(bit - 1));
	if (entry && !(entry & 3) && !folio_mappable((struct folio *)entry))
		t->waiting |= bit;
	return 0;
}

LOOP_STEP(step_mapped, MAP_WORDS, u32 step, struct working *c)
{
	struct around *a = &c->state->around;
	u64 word = a->word + step, window, fresh, on_way;
	struct transit *t = &c->state->transit;
	u32 at = word % BITS_WORDS;
	struct page_bits *bits;
	struct seen_bits *seen;

	if (word * 64 >= a->to || step >= MAP_WORDS)
		return 1;
	bits = bits_of(a->slot, word / BITS_WORDS, true);
	seen = seen_of(a->slot, a->tgid, word / BITS_WORDS);
	if (!bits || !seen) {
		a->failed = 1;
		return 1;
	}
	window = word_mask(word, a->from, a->to);
	fresh = window & ~seen->seen[at];
	if (fresh)
		a->again = 0;
	fresh &= bits->resident[at];
	on_way = fresh & ~bits->touched[at]; /* what has been used has arrived */
	if (on_way && !a->whole) {
		struct xa_node *leaf = NULL;
		struct folio *folio = folio_at(a->mapping, word * 64, &leaf);

		if (leaf) {
			t->leaf = leaf;
			t->pages = on_way;
			t->waiting = 0;
			LOOP(step_transit, c);
			fresh &= ~t->waiting;
		} else if (folio && !folio_mappable(folio)) {
			fresh &= ~on_way; /* a large folio holds the whole word */
		}
	}
	a->mapped[step] = fresh | (window & seen->seen[at] & bits->resident[at]);
	return 0;
}

LOOP_STEP(step_first, MAP_WORDS, u32 step, struct working *c)
{
	struct around *a = &c->state->around;
	u64 word = a->word + step, first;
	u32 at = word % BITS_WORDS;
	struct page_bits *bits;
	struct seen_bits *seen;

	if (word * 64 >= a->to || step >= MAP_WORDS)
		return 1;
	bits = bits_of(a->slot, word / BITS_WORDS, false);
	seen = seen_of(a->slot, a->tgid, word / BITS_WORDS);
	if (!bits || !seen)
		return 1;
	first = a->mapped[step];
	if (!a->again)
		first &= ~seen->seen[at];
	__sync_fetch_and_or(&seen->seen[at], a->mapped[step]);
	classify(bits, at, first, 0, false, &a->found);
	return 0;
}

/* Pages of one word have come; used: which of them are used already. */
static __always_inline void added_to_word(struct page_bits *bits, u32 at, u64 came, u64 used,
					  u32 by, u32 tid)
{
	__sync_fetch_and_or(&bits->resident[at], came);
	if (bits->touched[at] & came & ~used)
		__sync_fetch_and_and(&bits->touched[at], ~came | used);
	if (by == BY_US) {
		__sync_fetch_and_or(&bits->ours[at], came);
	} else if (by == BY_READ) {
		bits->adder = tid;
		__sync_fetch_and_or(&bits->fresh[at], came);
	}
}

/* Pages of one word have gone. */
static __always_inline void removed_from_word(struct page_bits *bits, u32 at, u64 gone,
					      struct found *found)
{
	u64 ours = gone & bits->ours[at];
	u64 unused = gone & bits->resident[at] & ~bits->touched[at] & ~ours;

	found->ours += count_bits(ours);
	found->ahead += count_bits(unused);
	__sync_fetch_and_and(&bits->resident[at], ~gone);
	if (bits->touched[at] & gone)
		__sync_fetch_and_and(&bits->touched[at], ~gone);
	if (ours)
		__sync_fetch_and_and(&bits->ours[at], ~gone);
	if (bits->fresh[at] & gone)
		__sync_fetch_and_and(&bits->fresh[at], ~gone);
}

LOOP_STEP(step_added, FOLIO_WORDS, u32 step, struct working *c)
{
	struct walk *w = &c->state->walk;
	u64 word = w->word++;
	struct page_bits *bits;

	if (word * 64 >= w->to)
		return 1;
	bits = bits_of(w->slot, word / BITS_WORDS, true);
	if (!bits)
		return 1;
	added_to_word(bits, word % BITS_WORDS, word_mask(word, w->from, w->to),
		      word_mask(word, w->index, w->index + 1), w->by, w->tid);
	return 0;
}

LOOP_STEP(step_removed, FOLIO_WORDS, u32 step, struct working *c)
{
	struct walk *w = &c->state->walk;
	u64 word = w->word++;
	struct page_bits *bits;

	if (word * 64 >= w->to)
		return 1;
	bits = bits_of(w->slot, word / BITS_WORDS, false);
	if (bits)
		removed_from_word(bits, word % BITS_WORDS, word_mask(word, w->from, w->to),
				  &w->found);
	return 0;
}

/* The pages of a folio of at most 64, in its word: a folio lies at a multiple of its size. */
static __always_inline u64 folio_mask(u64 index, u64 nr)
{
	return ~0ULL >> (-nr & 63) << (index & 63);
}

/* A folio has come; used: the page that is used already, or one that it does not have. */
static __always_inline void add_folio(struct task_state *state, u32 slot, u64 index, u64 nr,
				      u64 used, u32 by)
{
	struct working working = { state };
	u32 tid = (u32)bpf_get_current_pid_tgid();
	struct page_bits *bits;
	struct walk *w;

	if (nr <= 64) {
		bits = bits_of(slot, index / BITS_PAGES, true);
		if (bits)
			added_to_word(bits, index / 64 % BITS_WORDS, folio_mask(index, nr),
				      used - index < nr ? 1ULL << (used & 63) : 0, by, tid);
		return;
	}
	w = start_walk(state, slot, tid);
	w->index = used;
	w->from = index;
	w->to = index + nr;
	w->word = index / 64;
	w->by = by;
	LOOP(step_added, &working);
}

/* A folio has gone; found: what of it was never used. */
static __always_inline void remove_folio(struct task_state *state, u32 slot, u64 index, u64 nr,
					 struct found *found)
{
	struct working working = { state };
	struct page_bits *bits;
	struct walk *w;

	if (nr <= 64) {
		bits = bits_of(slot, index / BITS_PAGES, false);
		if (bits)
			removed_from_word(bits, index / 64 % BITS_WORDS, folio_mask(index, nr),
					  found);
		return;
	}
	w = start_walk(state, slot, 0);
	w->from = index;
	w->to = index + nr;
	w->word = index / 64;
	LOOP(step_removed, &working);
	*found = w->found;
}

#endif /* OBSERVER_STEPS_BPF_H */
