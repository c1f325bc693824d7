/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * simulate_maps.h - BPF maps and helpers for policies that run in a process (engine_simulate.h).
 *
 * A map is known by the address of its definition; its element sizes come from the types in it,
 * at each call.  Every kind of map behaves towards a policy as the kernel's does: hashes refuse
 * what exceeds max_entries, LRU hashes forget the element that has not been touched for longest,
 * arrays are there from the beginning.
 */
#ifndef SIMULATE_MAPS_H
#define SIMULATE_MAPS_H

extern void *malloc(unsigned long size);
extern void *calloc(unsigned long count, unsigned long size);
extern void *realloc(void *old, unsigned long size);
extern void free(void *memory);
extern void *memcpy(void *to, const void *from, unsigned long size);
extern void *memset(void *to, int byte, unsigned long size);
extern int memcmp(const void *a, const void *b, unsigned long size);

#define SIM_MAPS 64
#define SIM_BUCKETS 65536

struct sim_shape {
	u32 type;
	u32 key_size;
	u32 value_size;
	u32 max_entries;
};

struct sim_element {
	struct sim_element *chain;
	struct sim_element *newer;
	struct sim_element *older;
	u64 hash;
	u8 data[]; /* key, padded to 8 bytes, then value */
};

struct sim_map {
	const void *at; /* the policy's definition */
	struct sim_shape shape;
	u8 *array;
	struct sim_element **buckets;
	struct sim_element *newest;
	struct sim_element *oldest;
	u32 entries;
};

static struct sim_map sim_maps[SIM_MAPS];
static u32 sim_nr_maps;

static inline struct sim_map *sim_map_at(const void *at, struct sim_shape shape)
{
	struct sim_map *map;

	for (u32 i = 0; i < sim_nr_maps; i++)
		if (sim_maps[i].at == at)
			return &sim_maps[i];
	if (sim_nr_maps == SIM_MAPS)
		return NULL;
	map = &sim_maps[sim_nr_maps++];
	map->at = at;
	map->shape = shape;
	if (shape.type == BPF_MAP_TYPE_ARRAY || shape.type == BPF_MAP_TYPE_PERCPU_ARRAY)
		map->array = calloc(shape.max_entries, shape.value_size);
	else
		map->buckets = calloc(SIM_BUCKETS, sizeof(*map->buckets));
	return map;
}

static inline u64 sim_hash(const u8 *key, u32 size)
{
	u64 hash = 0xcbf29ce484222325ULL;

	for (u32 i = 0; i < size; i++)
		hash = (hash ^ key[i]) * 0x100000001b3ULL;
	return hash ^ hash >> 32;
}

static inline void sim_unlink(struct sim_map *map, struct sim_element *e)
{
	*(e->newer ? &e->newer->older : &map->newest) = e->older;
	*(e->older ? &e->older->newer : &map->oldest) = e->newer;
}

static inline void sim_link(struct sim_map *map, struct sim_element *e)
{
	e->newer = NULL;
	e->older = map->newest;
	*(map->newest ? &map->newest->newer : &map->oldest) = e;
	map->newest = e;
}

static inline u8 *sim_value(const struct sim_map *map, struct sim_element *e)
{
	return e->data + ((map->shape.key_size + 7) & ~7U);
}

static inline struct sim_element **sim_find(struct sim_map *map, const void *key, u64 hash)
{
	struct sim_element **at = &map->buckets[hash % SIM_BUCKETS];

	while (*at && ((*at)->hash != hash || memcmp((*at)->data, key, map->shape.key_size)))
		at = &(*at)->chain;
	return at;
}

static inline void *sim_map_lookup(const void *at, struct sim_shape shape, const void *key)
{
	struct sim_map *map = sim_map_at(at, shape);
	struct sim_element *found;

	if (!map)
		return NULL;
	if (map->array) {
		u32 index = *(const u32 *)key;

		return index < shape.max_entries ? map->array + (u64)index * shape.value_size
						 : NULL;
	}
	found = *sim_find(map, key, sim_hash(key, shape.key_size));
	if (!found)
		return NULL;
	if (shape.type == BPF_MAP_TYPE_LRU_HASH) {
		sim_unlink(map, found);
		sim_link(map, found);
	}
	return sim_value(map, found);
}

static inline long sim_map_delete(const void *at, struct sim_shape shape, const void *key)
{
	struct sim_map *map = sim_map_at(at, shape);
	struct sim_element **place, *gone;

	if (!map || map->array)
		return -22; /* EINVAL */
	place = sim_find(map, key, sim_hash(key, shape.key_size));
	gone = *place;
	if (!gone)
		return -2; /* ENOENT */
	*place = gone->chain;
	sim_unlink(map, gone);
	map->entries--;
	free(gone);
	return 0;
}

static inline long sim_map_update(const void *at, struct sim_shape shape, const void *key,
				  const void *value, u64 flags)
{
	void *old = sim_map_lookup(at, shape, key);
	struct sim_map *map = sim_map_at(at, shape);
	struct sim_element *e;
	u32 padded = (shape.key_size + 7) & ~7U;
	u64 hash;

	if (!map)
		return -12; /* ENOMEM */
	if (old && flags == BPF_NOEXIST)
		return -17; /* EEXIST */
	if (old) {
		memcpy(old, value, shape.value_size);
		return 0;
	}
	if (map->array)
		return -7; /* E2BIG */
	if (flags == BPF_EXIST)
		return -2;
	if (map->entries >= shape.max_entries) {
		if (shape.type != BPF_MAP_TYPE_LRU_HASH)
			return -7;
		sim_map_delete(at, shape, map->oldest->data);
	}
	e = calloc(1, sizeof(*e) + padded + shape.value_size);
	if (!e)
		return -12;
	hash = sim_hash(key, shape.key_size);
	e->hash = hash;
	memcpy(e->data, key, shape.key_size);
	memcpy(sim_value(map, e), value, shape.value_size);
	e->chain = map->buckets[hash % SIM_BUCKETS];
	map->buckets[hash % SIM_BUCKETS] = e;
	sim_link(map, e);
	map->entries++;
	return 0;
}

/* The callback's arguments as the kernel gives them: map, key, value, context. */
static inline long sim_for_each(const void *at, struct sim_shape shape,
				long (*callback)(void *, const void *, void *, void *), void *ctx)
{
	struct sim_map *map = sim_map_at(at, shape);
	struct sim_element *next;
	long seen = 0;

	if (!map)
		return -22;
	if (map->array) {
		for (u32 i = 0; i < shape.max_entries; i++, seen++)
			if (callback((void *)at, &i, map->array + (u64)i * shape.value_size, ctx))
				return seen + 1;
		return seen;
	}
	for (struct sim_element *e = map->oldest; e; e = next, seen++) {
		next = e->newer;
		if (callback((void *)at, e->data, sim_value(map, e), ctx))
			return seen + 1;
	}
	return seen;
}

/* The next key in the order of arrival; the first after a NULL key.  -2 (ENOENT): there is none. */
static inline long sim_next_key(const void *at, struct sim_shape shape, const void *key, void *next)
{
	struct sim_map *map = sim_map_at(at, shape);
	struct sim_element *e;
	u32 index;

	if (!map)
		return -22;
	if (map->array) {
		index = key ? *(const u32 *)key + 1 : 0;
		memcpy(next, &index, sizeof(index));
		return index < shape.max_entries ? 0 : -2;
	}
	e = key ? *sim_find(map, key, sim_hash(key, shape.key_size)) : NULL;
	e = e ? e->newer : map->oldest;
	if (!e)
		return -2;
	memcpy(next, e->data, shape.key_size);
	return 0;
}

static inline void sim_free_maps(void)
{
	for (u32 i = 0; i < sim_nr_maps; i++) {
		struct sim_element *older;

		for (struct sim_element *e = sim_maps[i].newest; e; e = older) {
			older = e->older;
			free(e);
		}
		free(sim_maps[i].array);
		free(sim_maps[i].buckets);
	}
	memset(sim_maps, 0, sizeof(sim_maps));
	sim_nr_maps = 0;
}

#endif /* SIMULATE_MAPS_H */
