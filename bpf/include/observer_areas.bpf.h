/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * observer_areas.bpf.h - the area of memory that a fault is in.
 *
 * A loader copies from its mapping to memory of its own, so the same two areas (vm_area_struct) are
 * looked up again and again.  A lookup (bpf_find_vma()) is expensive: where interrupts are off, the
 * mmap lock is released by an interrupt work item.  So a task's last area without a file and its
 * last one with a file are cached, as long as no mapping of the process has changed.  A loader that
 * copies faults in each page of its memory, so the last area without a file is cached by CPU, too,
 * where it takes no more than comparing a few numbers.
 */
#ifndef OBSERVER_AREAS_BPF_H
#define OBSERVER_AREAS_BPF_H

#include "observer.bpf.h"

struct area {
	u64 mm;
	u64 changes; /* of the mappings of mm, when it was found */
	u64 start;
	u64 end;
	u64 flags;
	u64 first; /* the file's page at its start */
	struct file *file;
};

struct areas {
	struct area memory;
	struct area mapping;
};

OBSERVER_MAP(BPF_MAP_TYPE_LRU_HASH, areas, 8192, 0, u32, struct areas);
OBSERVER_MAP(BPF_MAP_TYPE_PERCPU_ARRAY, last_memory, 1, 0, u32, struct area);

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)
struct seqcount {
	unsigned int sequence;
};

typedef struct seqcount seqcount_t;

/* Linux 6.13 on, commit eb449bd96954: odd while they change. */
struct mm_struct___counted {
	seqcount_t mm_lock_seq;
};

/* Linux 6.4 on, commit 5e31275cc997. */
struct mm_struct___numbered {
	int mm_lock_seq;
};

struct mm_struct {
	int map_count;
	unsigned long total_vm;
	unsigned long data_vm;
};

struct task_struct___mm {
	struct mm_struct *mm;
};
#pragma clang attribute pop

/* A number that differs after a mapping of the process was made, removed or changed. */
static __always_inline u64 changes_of(struct mm_struct *mm)
{
	struct mm_struct___counted *counted = (void *)mm;
	struct mm_struct___numbered *numbered = (void *)mm;

	if (bpf_core_field_exists(counted->mm_lock_seq.sequence))
		return LOAD(counted, mm_lock_seq.sequence);
	if (bpf_core_field_exists(numbered->mm_lock_seq))
		return LOAD(numbered, mm_lock_seq);
	return (u64)LOAD(mm, map_count) << 48 ^ LOAD(mm, total_vm) << 24 ^ LOAD(mm, data_vm);
}

static long keep_area(struct task_struct *task, struct vm_area_struct *found, struct area *area)
{
	area->changes = changes_of((void *)area->mm);
	area->start = READ(found, vm_start);
	area->end = READ(found, vm_end);
	area->flags = READ(found, vm_flags);
	area->first = READ(found, vm_pgoff);
	area->file = READ(found, vm_file);
	return 0;
}

static __always_inline bool area_holds(struct area *area, u64 mm, u64 changes, u64 address)
{
	return address >= area->start && address < area->end && area->changes == changes &&
	       area->mm == mm;
}

static __always_inline struct mm_struct *current_mm(void)
{
	struct task_struct___mm *task = (void *)current_task();

	return LOAD(task, mm);
}

/* Whether an address of this task is in the area without a file that this CPU has seen last. */
static __always_inline bool in_last_memory(u64 address)
{
	u32 zero = 0;
	struct area *last = MAP_LOOKUP(last_memory, &zero);
	struct mm_struct *mm = current_mm();

	return last && area_holds(last, (u64)mm, changes_of(mm), address);
}

static __always_inline void keep_last_memory(const struct area *memory)
{
	u32 zero = 0;
	struct area *last = MAP_LOOKUP(last_memory, &zero);

	if (last)
		*last = *memory;
}

/* The area with a file around an address of this task, NULL if there is none such. */
static __always_inline struct area *mapping_at(u64 address)
{
	struct mm_struct *mm = current_mm();
	struct area found = { .mm = (u64)mm };
	u64 changes = changes_of(mm);
	u32 tid = (u32)bpf_get_current_pid_tgid();
	struct areas *kept = MAP_LOOKUP(areas, &tid);

	if (!kept) {
		MAKE_ELEMENT(areas, &tid);
		kept = MAP_LOOKUP(areas, &tid);
		if (!kept)
			return NULL;
	}
	if (area_holds(&kept->memory, found.mm, changes, address)) {
		keep_last_memory(&kept->memory);
		return NULL;
	}
	if (area_holds(&kept->mapping, found.mm, changes, address))
		return &kept->mapping;
	if (FIND_AREA(address, keep_area, &found))
		return NULL;
	if (!found.file) {
		kept->memory = found;
		keep_last_memory(&found);
		return NULL;
	}
	kept->mapping = found;
	return &kept->mapping;
}

/*
 * A huge page of a tagged file that is mapped whole, if a fault there finds it: the first page of
 * the file that it holds.  Without one f->mapping stays NULL.
 */
static __always_inline void huge_page_at(struct fault *f)
{
	u64 shift = observer_page_shift & 31, huge, index;
	struct area *area = mapping_at(f->address);
	struct pagecache_file_key key;
	struct xa_node *leaf = NULL;
	struct folio *folio;
	struct file *file;

	if (!area)
		return;
	file = area->file;
	huge = f->address & ~((MAX_FOLIO_PAGES << shift) - 1);
	index = area->first + ((f->address - area->start) >> shift);
	if (huge < area->start || huge + (MAX_FOLIO_PAGES << shift) > area->end ||
	    area->flags & VM_NOHUGEPAGE)
		return;
	f->inode = READ(file, f_inode);
	f->from = index - ((f->address - huge) >> shift);
	if (f->from % MAX_FOLIO_PAGES || f->from + MAX_FOLIO_PAGES > file_pages_of(f->inode) ||
	    !tag_of(f->inode, &key))
		return;
	folio = folio_at(READ(file, f_mapping), index, &leaf);
	if (folio && folio_pages(folio) == MAX_FOLIO_PAGES &&
	    folio_flags(folio) & FOLIO_BIT(uptodate))
		f->mapping = READ(file, f_mapping);
}

#endif /* OBSERVER_AREAS_BPF_H */
