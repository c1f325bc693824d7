// SPDX-License-Identifier: GPL-2.0-only
/* control.c - /dev/pagecache_bpf, the control device.  Root only. */
#include <linux/capability.h>
#include <linux/file.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "control.h"
#include "hooks.h"
#include "sessions.h"
#include "tags.h"

/* Each open control device is a session; until files are lent it holds nothing. */
static int pcb_open(struct inode *inode, struct file *file)
{
	if (!capable(CAP_SYS_ADMIN))
		return -EPERM;
	file->private_data = pcb_session_new();
	return file->private_data ? 0 : -ENOMEM;
}

static int pcb_release(struct inode *inode, struct file *file)
{
	pcb_session_end(file->private_data);
	return 0;
}

static long pcb_ioc_info(void __user *arg)
{
	struct pagecache_info info = {
		.abi_version = PAGECACHE_ABI_VERSION,
		.hooks = pcb_hooks_available(),
		.tags = pcb_tag_count(),
		.max_answer_pages = pcb_mib_to_pages(pcb_max_answer_mib),
		.max_extent_pages = pcb_mib_to_pages(pcb_max_extent_mib),
		.max_inflight_pages = pcb_mib_to_pages(pcb_max_inflight_mib),
		.workers_per_node = pcb_workers,
		.max_invalid = pcb_max_invalid,
		.max_keep_pages = pcb_max_keep_pages(),
		.max_evict_us = pcb_max_evict_us,
		.lent = pcb_lent_count(),
	};
	struct pcb_policy *p;

	mutex_lock(&pcb_mutex);
	list_for_each_entry (p, &pcb_policies, list)
		info.policies += !test_bit(PCB_ENDED, &p->ended);
	mutex_unlock(&pcb_mutex);
	return copy_to_user(arg, &info, sizeof(info)) ? -EFAULT : 0;
}

static bool pcb_terminated(const char *text, size_t size)
{
	return strnlen(text, size) < size;
}

static long pcb_ioc_tag(void __user *arg)
{
	struct pagecache_tag_request *req = memdup_user(arg, sizeof(*req));
	struct file *file;
	long err = -EINVAL;

	if (IS_ERR(req))
		return PTR_ERR(req);
	if (pcb_terminated(req->policy, sizeof(req->policy)) &&
	    pcb_terminated(req->model, sizeof(req->model)) &&
	    pcb_terminated(req->path, sizeof(req->path))) {
		file = fget(req->fd);
		err = file ? pcb_tag_add(file, req) : -EBADF;
		if (file)
			fput(file);
	}
	kfree(req);
	return err;
}

static long pcb_ioc_untag(void __user *arg)
{
	struct pagecache_untag_request req;
	struct file *file = NULL;
	long err;

	if (copy_from_user(&req, arg, sizeof(req)))
		return -EFAULT;
	if (req.fd >= 0) {
		file = fget(req.fd);
		if (!file)
			return -EBADF;
	}
	err = pcb_tag_del(file, &req);
	if (file)
		fput(file);
	return err;
}

/* Lends an open file, or takes it back. */
static long pcb_ioc_lend(struct pcb_session *session, void __user *arg,
			 int (*what)(struct pcb_session *session, struct file *file))
{
	struct pagecache_lend_request req;
	struct file *file;
	long err;

	if (copy_from_user(&req, arg, sizeof(req)))
		return -EFAULT;
	if (req.flags)
		return -EINVAL;
	file = fget(req.fd);
	if (!file)
		return -EBADF;
	err = what(session, file);
	fput(file);
	return err;
}

static long pcb_ioc_tags(void __user *arg)
{
	struct pagecache_tag_record *rec = memdup_user(arg, sizeof(*rec));
	long err;

	if (IS_ERR(rec))
		return PTR_ERR(rec);
	mutex_lock(&pcb_mutex);
	err = pcb_tag_next(rec);
	mutex_unlock(&pcb_mutex);
	if (!err && copy_to_user(arg, rec, sizeof(*rec)))
		err = -EFAULT;
	kfree(rec);
	return err;
}

static void pcb_policy_fill(struct pagecache_policy_record *rec, struct pcb_policy *p)
{
	*rec = (struct pagecache_policy_record){
		.seq = p->seq,
		.attached_ns = p->attached_ns,
		.governed_pages = max_t(s64, atomic64_read(&p->governed), 0),
		.inflight_pages = max_t(s64, atomic64_read(&p->inflight), 0),
		.hooks = p->hooks,
		.tags = atomic_read(&p->tags),
		.kept_pages = max_t(s64, atomic64_read(&p->kept), 0),
		.keep_max_pages = READ_ONCE(p->keep_max),
	};
	strscpy(rec->name, p->name, sizeof(rec->name));
	pcb_policy_counters(p, rec->counters);
}

static long pcb_ioc_policies(void __user *arg)
{
	struct pagecache_policy_record rec;
	struct pcb_policy *p;
	long err = -ENOENT;

	if (copy_from_user(&rec, arg, sizeof(rec)))
		return -EFAULT;
	mutex_lock(&pcb_mutex);
	list_for_each_entry (p, &pcb_policies, list) {
		if (p->seq > rec.seq && !test_bit(PCB_ENDED, &p->ended)) {
			pcb_policy_fill(&rec, p);
			err = 0;
			break;
		}
	}
	mutex_unlock(&pcb_mutex);
	if (!err && copy_to_user(arg, &rec, sizeof(rec)))
		err = -EFAULT;
	return err;
}

static long pcb_ioc_exits(void __user *arg)
{
	struct pagecache_exit_record *rec = memdup_user(arg, sizeof(*rec));
	long err;

	if (IS_ERR(rec))
		return PTR_ERR(rec);
	mutex_lock(&pcb_mutex);
	err = pcb_exit_next(rec);
	mutex_unlock(&pcb_mutex);
	if (!err && copy_to_user(arg, rec, sizeof(*rec)))
		err = -EFAULT;
	kfree(rec);
	return err;
}

static long pcb_ioctl(struct file *file, unsigned int cmd, unsigned long value)
{
	void __user *arg = (void __user *)value;

	switch (cmd) {
	case PAGECACHE_IOC_INFO:
		return pcb_ioc_info(arg);
	case PAGECACHE_IOC_TAG:
		return pcb_ioc_tag(arg);
	case PAGECACHE_IOC_UNTAG:
		return pcb_ioc_untag(arg);
	case PAGECACHE_IOC_TAGS:
		return pcb_ioc_tags(arg);
	case PAGECACHE_IOC_POLICIES:
		return pcb_ioc_policies(arg);
	case PAGECACHE_IOC_EXITS:
		return pcb_ioc_exits(arg);
	case PAGECACHE_IOC_LEND:
		return pcb_ioc_lend(file->private_data, arg, pcb_session_lend);
	case PAGECACHE_IOC_TAKE_BACK:
		return pcb_ioc_lend(file->private_data, arg, pcb_session_take_back);
	}
	return -ENOTTY;
}

static const struct file_operations pcb_fops = {
	.owner = THIS_MODULE,
	.open = pcb_open,
	.release = pcb_release,
	.unlocked_ioctl = pcb_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
};

static struct miscdevice pcb_device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = PAGECACHE_DEVICE,
	.fops = &pcb_fops,
	.mode = 0600,
};

int pcb_control_init(void)
{
	return misc_register(&pcb_device);
}

void pcb_control_exit(void)
{
	misc_deregister(&pcb_device);
}
