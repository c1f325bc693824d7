/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * inodes.bpf.h - inode numbers that tagged files may have: what every read of any file is asked.
 *
 * One bit for all numbers that are the same modulo 64 * INODE_WORDS.  User space keeps them
 * (pagecache_bpf/kernel/inode_filter.py), 64 in an element of an array that fits the first cache.
 */
#ifndef INODES_BPF_H
#define INODES_BPF_H

#define INODE_WORDS 1024

static __always_inline u32 inode_word(u64 ino)
{
	return ino / 64 % INODE_WORDS;
}

/* word: the element that inode_word() names. */
static __always_inline bool inode_in(const u64 *word, u64 ino)
{
	return word && *word >> (ino & 63) & 1;
}

#endif /* INODES_BPF_H */
