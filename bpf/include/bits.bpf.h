/* SPDX-License-Identifier: GPL-2.0-only */
/* bits.bpf.h - how many bits of a word are set. */
#ifndef BITS_BPF_H
#define BITS_BPF_H

/* Population count: BPF has no instruction for it, and clang's own code takes 64-bit constants. */
static __always_inline u32 count_bits(u64 v)
{
	v -= v >> 1 & 0x5555555555555555ULL;
	v = (v & 0x3333333333333333ULL) + (v >> 2 & 0x3333333333333333ULL);
	v = (v + (v >> 4)) & 0x0f0f0f0f0f0f0f0fULL;
	return v * 0x0101010101010101ULL >> 56;
}

#endif /* BITS_BPF_H */
