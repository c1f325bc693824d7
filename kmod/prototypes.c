// SPDX-License-Identifier: GPL-2.0-only
/*
 * prototypes.c - are the functions that are hooked what the module was built for?
 *
 * Arguments are taken from registers, and a distribution may have changed a function without its
 * headers telling (a backport).  Each function and tracepoint is compared with the running kernel's
 * own description of it (BTF) when the module is loaded; a difference is said and nothing is
 * hooked.
 */
#include <linux/bpf.h>
#include <linux/btf.h>
#include <linux/static_call.h>

#include "hooks.h"

static struct btf *pcb_no_vmlinux(void)
{
	return NULL;
}

static s32 pcb_no_btf_find(const struct btf *btf, const char *name, u8 kind)
{
	return -ENOENT;
}

static const char *pcb_no_name(const struct btf *btf, u32 offset)
{
	return NULL;
}

static const struct btf_type *pcb_no_modifiers(const struct btf *btf, u32 id, u32 *res_id)
{
	return NULL;
}

pcb_check_prototype(bpf_get_btf_vmlinux, pcb_no_vmlinux);
pcb_check_prototype(btf_find_by_name_kind, pcb_no_btf_find);
pcb_check_prototype(btf_name_by_offset, pcb_no_name);
pcb_check_prototype(btf_type_skip_modifiers, pcb_no_modifiers);
DEFINE_STATIC_CALL(pcb_btf_vmlinux, pcb_no_vmlinux);
DEFINE_STATIC_CALL(pcb_btf_find, pcb_no_btf_find);
DEFINE_STATIC_CALL(pcb_btf_name, pcb_no_name);
DEFINE_STATIC_CALL(pcb_btf_skip_modifiers, pcb_no_modifiers);

static struct btf *pcb_vmlinux; /* NULL: nothing can be compared */

#define PCB_FIND(call, function)                                               \
	({                                                                     \
		unsigned long pcb_addr = pcb_symbol(#function);                \
		if (pcb_addr)                                                  \
			static_call_update(call, (typeof(&function))pcb_addr); \
		pcb_addr;                                                      \
	})

/* Returns -ENOENT without what policies cannot be attached without. */
int pcb_prototypes_init(void)
{
	if (!PCB_FIND(pcb_btf_find, btf_find_by_name_kind))
		return -ENOENT;
	if (PCB_FIND(pcb_btf_vmlinux, bpf_get_btf_vmlinux) &&
	    PCB_FIND(pcb_btf_name, btf_name_by_offset) &&
	    PCB_FIND(pcb_btf_skip_modifiers, btf_type_skip_modifiers))
		pcb_vmlinux = static_call(pcb_btf_vmlinux)();
	if (IS_ERR_OR_NULL(pcb_vmlinux)) {
		pr_warn("without the kernel's BTF its functions cannot be compared with those the "
			"module was built for\n");
		pcb_vmlinux = NULL;
	}
	return 0;
}

/* The id of a type; negative: there is none. */
s32 pcb_btf_find_id(const struct btf *btf, const char *name, u8 kind)
{
	return static_call(pcb_btf_find)(btf, name, kind);
}

/* A name in a BTF by its offset; NULL: it cannot be looked up. */
const char *pcb_btf_name_of(const struct btf *btf, u32 offset)
{
	return static_call(pcb_btf_name)(btf, offset);
}

static const struct btf_type *pcb_type(u32 id)
{
	return static_call(pcb_btf_skip_modifiers)(pcb_vmlinux, id, NULL);
}

/* Writes a type as pcb_prototype_check() spells it. */
static int pcb_render_type(char *out, size_t size, u32 id)
{
	const struct btf_type *type = pcb_type(id), *target;
	const char *name = NULL;

	if (!type || BTF_INFO_KIND(type->info) == BTF_KIND_UNKN) /* void has no type */
		return scnprintf(out, size, "void");
	if (btf_type_is_ptr(type)) {
		target = pcb_type(type->type);
		if (target && btf_type_is_struct(target))
			name = static_call(pcb_btf_name)(pcb_vmlinux, target->name_off);
		return name && name[0] ? scnprintf(out, size, "%s *", name)
				       : scnprintf(out, size, "pointer");
	}
	return scnprintf(out, size, "int%u", 8 * type->size);
}

static void pcb_render(char *out, size_t size, const struct btf_type *proto)
{
	const struct btf_param *param = (const struct btf_param *)(proto + 1);
	unsigned int i, length = pcb_render_type(out, size, proto->type);

	length += scnprintf(out + length, size - length, "(");
	for (i = 0; i < btf_type_vlen(proto); i++) {
		length += scnprintf(out + length, size - length, i ? ", " : "");
		length += pcb_render_type(out + length, size - length, param[i].type);
	}
	scnprintf(out + length, size - length, ")");
}

static int pcb_compare(const char *name, s32 id, bool typedef_of_pointer, const char *expected)
{
	const struct btf_type *type;
	char found[192];

	if (id < 0) {
		pr_info("%s: not in the kernel's BTF, so not compared\n", name);
		return 0;
	}
	type = btf_type_by_id(pcb_vmlinux, id);
	if (typedef_of_pointer)
		type = btf_type_by_id(pcb_vmlinux, type->type);
	type = btf_type_by_id(pcb_vmlinux, type->type);
	pcb_render(found, sizeof(found), type);
	if (!strcmp(found, expected))
		return 0;
	pr_err("%s is %s in this kernel, the module was built for %s: build it for this kernel\n",
	       name, found, expected);
	return -EPROTO;
}

/*
 * Whether a function is what @expected says, such as "void(readahead_control *, pointer, int64)":
 * integers by their size, pointers to structs by the struct, all other pointers alike.
 */
int pcb_prototype_check(const char *name, const char *expected)
{
	if (!pcb_vmlinux)
		return 0;
	return pcb_compare(name, pcb_btf_find_id(pcb_vmlinux, name, BTF_KIND_FUNC), false,
			   expected);
}

/* Compare a tracepoint's; the first argument is what was registered with the probe. */
int pcb_tracepoint_check(const char *name, const char *expected)
{
	char type[64];

	if (!pcb_vmlinux)
		return 0;
	snprintf(type, sizeof(type), "btf_trace_%s", name);
	return pcb_compare(name, pcb_btf_find_id(pcb_vmlinux, type, BTF_KIND_TYPEDEF), true,
			   expected);
}
