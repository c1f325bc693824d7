/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * reading_thread.bpf.h - whether a thread reads ahead for a load, by its name.
 *
 * load() of a user who may not talk to any controller reads ahead by threads of its own process,
 * which nobody could tell of.  They carry the name that the agent's workers have.  Whoever else
 * takes that name is not counted as a reader and has nothing read ahead: it can deceive itself
 * only.
 */
#ifndef READING_THREAD_BPF_H
#define READING_THREAD_BPF_H

union thread_name {
	char text[16];
	u64 words[2];
};

/* Whether a name is "pagecache-read"; BPF is compiled for little-endian machines only. */
static __always_inline bool is_reading_thread(const union thread_name *name)
{
	return name->words[0] == 0x6863616365676170ULL && name->words[1] == 0x0000646165722d65ULL;
}

#endif
