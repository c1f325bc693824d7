/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * inodes.bpf.h - a Bloom-like prefilter of the inode numbers of tagged files.
 *
 * Every read of any file is looked up here first, so that a file that is not tagged costs one test
 * of a bit.  The one hash function is the inode number modulo 64 * INODE_WORDS.  User space sets
 * the bits (pagecache_bpf/kernel/inode_filter.py), 64 in an element of an array that fits into the
 * CPU's first-level cache.
 */
#ifndef INODES_BPF_H
#define INODES_BPF_H

#define INODE_WORDS 1024

static __always_inline u32 inode_word(u64 ino)
{
	return ino / 64 % INODE_WORDS;
}

/* Whether a file with this inode number may be tagged; @word: the element for inode_word(). */
static __always_inline bool inode_in(const u64 *word, u64 ino)
{
	return word && *word >> (ino & 63) & 1;
}

#endif /* INODES_BPF_H */
