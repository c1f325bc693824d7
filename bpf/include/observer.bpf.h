/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * observer.bpf.h - what the observer's programs share: the kernel's types, maps, helpers.
 *
 * Two compilers take the same programs.  clang makes an object in which libbpf fills in the offsets
 * of the kernel's members by BTF (CO-RE).  BCC (PAGECACHE_BCC) compiles on the machine, against the
 * kernel's own headers, for kernels without BTF: offsets are constants then, and maps are file
 * descriptors that user space made before.
 */
#ifndef OBSERVER_BPF_H
#define OBSERVER_BPF_H

#ifdef PAGECACHE_BCC
#include "observer_bcc.bpf.h"
#else
#include "observer_core.bpf.h"
#endif
#include "bits.bpf.h"
#include "inodes.bpf.h"
#include "reading_thread.bpf.h"

#define BITS_PAGES 1024 /* pages of one element of page_bits */
#define BITS_WORDS (BITS_PAGES / 64)
#define BATCH_FOLIOS 31 /* what filemap_get_pages() hands out at once: PAGEVEC_SIZE */
#define MAX_FOLIO_PAGES 512 /* what a huge page has, too */
#define MAX_WORDS 256 /* of one walk over page bits */
#ifdef PAGECACHE_BCC
#define MAP_WORDS 2 /* of one fault-around: 16 pages, anyhow aligned */
#else
#define MAP_WORDS 9 /* a page table's worth, anyhow aligned */
#endif
#define FOLIO_WORDS (MAX_FOLIO_PAGES / 64 + 1)
#define REGISTERS 20

/* What there has to be before a huge page of a tagged file can be mapped; never 0 again. */
#define HUGE_MAPPER 0 /* a process that maps tagged files */
#define HUGE_FOLIO 1 /* a folio as large; user space says it of what was there before the tag */
#define HUGE_NEEDS 2

#define FAULT_TOLD 1 /* of the page, which is not there */
#define FAULT_READ 2 /* it has been added since */

#include "observer_types.bpf.h"

#ifndef PAGECACHE_BCC
/* BPF_F_NO_PREALLOC is 1. */
OBSERVER_MAP(BPF_MAP_TYPE_ARRAY, inode_bits, INODE_WORDS, 0, u32, u64);
OBSERVER_MAP(BPF_MAP_TYPE_HASH, observed_files, 131072, 1, struct pagecache_file_key,
	     struct pagecache_observed_file);
OBSERVER_MAP(BPF_MAP_TYPE_HASH, page_bits, 1 << 18, 1, struct bits_key, struct page_bits);
OBSERVER_MAP(BPF_MAP_TYPE_HASH, seen_bits, 1 << 18, 1, struct seen_key, struct seen_bits);
OBSERVER_MAP(BPF_MAP_TYPE_HASH, observed, 16384, 1, struct pagecache_observed_key,
	     struct pagecache_observed_value);
OBSERVER_MAP(BPF_MAP_TYPE_LRU_HASH, task_states, 8192, 0, u32, struct task_state);
OBSERVER_MAP(BPF_MAP_TYPE_HASH, own_processes, 256, 1, u32, u32);
OBSERVER_MAP(BPF_MAP_TYPE_ARRAY, own_changes, 1, 0, u32, u64);
OBSERVER_MAP(BPF_MAP_TYPE_HASH, mappers, 4096, 1, u32, u32);
OBSERVER_MAP(BPF_MAP_TYPE_ARRAY, zeroes, 1, 0, u32, struct zeroes);
OBSERVER_MAP(BPF_MAP_TYPE_ARRAY, huge_mappings, HUGE_NEEDS, 0, u32, u32);
OBSERVER_MAP(BPF_MAP_TYPE_ARRAY, observer_state, 1, 0, u32, struct pagecache_observer_state);

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20);
} moves SEC(".maps");
#endif

/* Hide a number's value from the compiler, which would make branches of what follows. */
#define OPAQUE(value) asm volatile("" : "+r"(value))

/* n between 0 and 64, without a branch: the verifier follows both sides of each. */
static __always_inline u64 clamp_64(s64 n)
{
	s64 over;

	OPAQUE(n);
	n &= ~(n >> 63);
	over = n - 64;
	OPAQUE(over);
	return 64 + (over & over >> 63);
}

/* Bits of a word, from page `from` to `to` of the file (exclusive). */
static __always_inline u64 word_mask(u64 word, u64 from, u64 to)
{
	u64 low = clamp_64(from - word * 64), high = clamp_64(to - word * 64);
	u64 below_low = ((1ULL << (low & 63)) - 1) | -(low >> 6);
	u64 below_high = ((1ULL << (high & 63)) - 1) | -(high >> 6);

	return below_high & ~below_low;
}

/* What every new element begins as; larger than the stack takes. */
static __always_inline void *some_zeroes(void)
{
	u32 zero = 0;

	return MAP_LOOKUP(zeroes, &zero);
}

#define MAKE_ELEMENT(map, key)                                      \
	do {                                                        \
		void *nothing = some_zeroes();                      \
		if (nothing)                                        \
			MAP_UPDATE(map, key, nothing, BPF_NOEXIST); \
	} while (0)

static __always_inline struct pagecache_observer_state *observer(void)
{
	u32 zero = 0;

	return MAP_LOOKUP(observer_state, &zero);
}

static __always_inline struct page_bits *bits_of(u32 slot, u64 block, bool make)
{
	struct bits_key key = { .slot = slot, .block = block };
	struct page_bits *bits = MAP_LOOKUP(page_bits, &key);
	struct pagecache_observer_state *all;

	if (bits || !make)
		return bits;
	MAKE_ELEMENT(page_bits, &key);
	bits = MAP_LOOKUP(page_bits, &key);
	if (!bits) {
		all = observer();
		if (all)
			__sync_fetch_and_add(&all->lost_pages, BITS_PAGES);
	}
	return bits;
}

static __always_inline struct seen_bits *seen_of(u32 slot, u32 tgid, u64 block)
{
	struct seen_key key = { .slot = slot, .tgid = tgid, .block = block };
	struct seen_bits *bits = MAP_LOOKUP(seen_bits, &key);

	if (bits)
		return bits;
	MAKE_ELEMENT(seen_bits, &key);
	return MAP_LOOKUP(seen_bits, &key);
}

static __always_inline struct task_state *state_of(u32 tid)
{
	struct task_state *state = MAP_LOOKUP(task_states, &tid);

	if (state)
		return state;
	MAKE_ELEMENT(task_states, &tid);
	return MAP_LOOKUP(task_states, &tid);
}

/* The counters of a consumer; 0: what no reader did. */
static __always_inline struct pagecache_observed_value *value_of(u32 model, u32 tgid)
{
	struct pagecache_observed_key key = { .model = model, .tgid = tgid };
	struct pagecache_observed_value *value = MAP_LOOKUP(observed, &key);
	struct pagecache_observer_state *all;

	if (!value) {
		MAKE_ELEMENT(observed, &key);
		value = MAP_LOOKUP(observed, &key);
		if (value && tgid)
			bpf_get_current_comm(value->comm, sizeof(value->comm));
	}
	if (!value && tgid) {
		all = observer();
		if (all)
			__sync_fetch_and_add(&all->lost_consumers, 1);
		key.tgid = 0; /* made by user space with the model */
		value = MAP_LOOKUP(observed, &key);
	}
	return value;
}

static __always_inline void count(struct pagecache_observed_value *value, u32 counter, u64 n)
{
	if (n && counter < PAGECACHE_OBSERVED_NR)
		__sync_fetch_and_add(&value->counters[counter], n);
}

#define COUNT_PAGES(value, name, pages) \
	count(value, PAGECACHE_OBSERVED_##name, (u64)(pages) << (observer_page_shift & 31))

/* Whether the agent, a worker of the module or a thread that reads ahead for a load is at work. */
static __always_inline bool by_us(struct task_struct *task)
{
	struct bpf_pidns_info ids = {};
	union thread_name name = {};
	const char *comm = name.text;

	bpf_get_current_comm(&name, sizeof(name));
	if (READ(task, flags) & PF_KTHREAD)
		return comm[0] == 'p' && comm[1] == 'a' && comm[2] == 'g' && comm[3] == 'e' &&
		       comm[4] == 'c' && comm[9] == '/';
	if (is_reading_thread(&name))
		return true;
	return !bpf_get_ns_current_pid_tgid(observer_pidns_dev, observer_pidns_ino, &ids,
					    sizeof(ids)) &&
	       MAP_LOOKUP(own_processes, &ids.tgid);
}

/*
 * by_us() of the task whose state this is.  It is asked for each page, so what it said is kept
 * until the processes that are ours change, or another task has the number.
 */
static __always_inline bool state_by_us(struct task_state *state, struct task_struct *task)
{
	u64 started = READ(task, start_time), *changes, now;
	u32 zero = 0;

	changes = MAP_LOOKUP(own_changes, &zero);
	now = changes ? *changes : 0;
	if (state->started != started || state->own_changes != now) {
		state->ours = by_us(task);
		state->started = started;
		state->own_changes = now;
	}
	return state->ours;
}

/* Whether a file with that inode number may be tagged, which is not so for most files. */
static __always_inline bool may_be_tagged(u64 ino)
{
	u32 word = inode_word(ino);

	return inode_in(MAP_LOOKUP(inode_bits, &word), ino);
}

/* The tag of a file. */
static __always_inline struct pagecache_observed_file *tag_of(struct inode *inode,
							      struct pagecache_file_key *key)
{
	u64 ino = READ(inode, i_ino);
	struct super_block *sb;
	u32 dev;

	if (!may_be_tagged(ino))
		return NULL;
	sb = READ(inode, i_sb);
	dev = DEVICE_OF(inode, sb);
	key->ino = ino;
	key->dev_major = dev >> 20;
	key->dev_minor = dev & 0xfffff;
	key->generation = READ(inode, i_generation);
	key->reserved = 0;
	return MAP_LOOKUP(observed_files, key);
}

/*
 * Where a task has entered the kernel: one number of its registers.  With the number of finished
 * read calls it tells one system call from the next, and one fault from another.
 */
static __always_inline u64 whereabouts(void)
{
	u64 registers[REGISTERS] = {}, sum = 0;

	bpf_probe_read_kernel(registers, sizeof(registers), user_regs());
	for (u32 i = 0; i < REGISTERS; i++)
		sum = sum * 0x9e3779b97f4a7c15ULL + registers[i];
	return sum;
}

/* An open file of a task by its descriptor, NULL if it has none such. */
static __always_inline struct file *file_of(struct task_struct *task, u64 fd)
{
	struct fdtable *table = READ(task, files, fdt);
	struct file **files = READ(table, fd), *file = NULL;

	if (fd >= READ(table, max_fds))
		return NULL;
	bpf_probe_read_kernel(&file, sizeof(file), files + fd);
	return file;
}

#define OVERLAYFS_SUPER_MAGIC 0x794c7630

/* Whether reading an open file reads these pages: on overlayfs they are those of a layer's file. */
static __always_inline bool has_pages_of(struct file *file, struct inode *inode)
{
	struct inode *opened = READ(file, f_inode);
	struct super_block *sb = READ(opened, i_sb);

	return opened == inode || READ(sb, s_magic) == OVERLAYFS_SUPER_MAGIC;
}

/*
 * Where in the file the read call began that this task is in: its argument, or the position of
 * the open file, which moves at the end of a call.  Returns the page, or `otherwise`.
 */
static __always_inline u64 first_page_of_call(struct task_struct *task, struct inode *inode,
					      u64 otherwise)
{
	s64 number = syscall_number();
	bool told = number == observer_sys_pread || number == observer_sys_preadv ||
		    number == observer_sys_preadv2;
	struct file *file;
	u64 position;

	if (!told && number != observer_sys_read && number != observer_sys_readv)
		return otherwise;
	file = file_of(task, syscall_argument(1));
	if (!file || !has_pages_of(file, inode))
		return otherwise;
	position = told ? syscall_argument(4) : (u64)READ(file, f_pos);
	if (position == ~0ULL) /* preadv2() at the position of the open file */
		position = READ(file, f_pos);
	position >>= observer_page_shift & 31;
	return position < otherwise ? position : otherwise;
}

/* What a slot of a node of the index holds; siblings lead to the slot with the folio. */
static __always_inline u64 slot_of(struct xa_node *node, u64 at)
{
	u64 entry = 0;

	bpf_probe_read_kernel(&entry, 8, (void *)node + SLOTS_OFFSET + 8 * at);
	if ((entry & 3) == 2 && entry < 4096)
		bpf_probe_read_kernel(&entry, 8,
				      (void *)node + SLOTS_OFFSET + 8 * (entry >> 2 & 63));
	return entry;
}

/*
 * The folio that holds a page, NULL if none; the caller's tracepoint holds off its freeing.
 * leaf: set to the node with a slot for each page around, if there is one.
 */
static __always_inline struct folio *folio_at(struct address_space *mapping, u64 index,
					      struct xa_node **leaf)
{
	u64 entry = (u64)PAGES_OF(mapping);

	for (u32 level = 0; level < 8; level++) {
		struct xa_node *node = (void *)(entry - 2);
		u64 shift;

		if ((entry & 3) != 2 || entry <= 4096)
			break;
		shift = READ(node, shift) & 63;
		if (!shift)
			*leaf = node;
		entry = slot_of(node, index >> shift & 63);
		if (!shift)
			break;
	}
	return entry & 3 ? NULL : (struct folio *)entry;
}

/* Whether mapping around a fault takes it: not while it is read, nor with a readahead mark. */
static __always_inline bool folio_mappable(struct folio *folio)
{
	u64 bits = FOLIO_BIT(uptodate) | FOLIO_BIT(locked) | READAHEAD_BIT;

	return (folio_flags(folio) & bits) == FOLIO_BIT(uptodate);
}

/* Where the folio of a page begins, or ends; if there is none, the page itself does. */
static __always_inline u64 folio_edge(struct address_space *mapping, u64 index, bool end)
{
	struct xa_node *leaf = NULL;
	struct folio *folio = folio_at(mapping, index, &leaf);
	u64 first = folio ? index_of(folio) : index;
	u64 nr = folio ? folio_pages(folio) : 1;

	if (nr > MAX_FOLIO_PAGES || first > index || first + nr <= index)
		return end ? index + 1 : index;
	return end ? first + nr : first;
}

/* Remember that there is something huge mappings need. */
static __always_inline void note_huge(u32 what)
{
	u32 *there = MAP_LOOKUP(huge_mappings, &what);

	if (there && !*there)
		*there = 1;
}

/* Whether a huge page of a tagged file can be mapped at all: else faults need not be looked at. */
static __always_inline bool huge_mappings_possible(void)
{
	u32 mapper = HUGE_MAPPER, folio = HUGE_FOLIO;
	u32 *mappers_there = MAP_LOOKUP(huge_mappings, &mapper);
	u32 *folios_there = MAP_LOOKUP(huge_mappings, &folio);

	return mappers_there && folios_there && *mappers_there && *folios_there;
}

/* Remember that a process maps tagged files: its faults are looked at. */
static __always_inline void note_mapper(u32 tgid)
{
	u32 one = 1;

	if (!MAP_LOOKUP(mappers, &tgid))
		MAP_UPDATE(mappers, &tgid, &one, BPF_ANY);
	note_huge(HUGE_MAPPER);
}

static __always_inline u64 file_pages_of(struct inode *inode)
{
	u32 shift = observer_page_shift & 31;

	return (READ(inode, i_size) + (1ULL << shift) - 1) >> shift;
}

#endif /* OBSERVER_BPF_H */
