// PROCMAP_QUERY, for kernel headers older than Linux 6.11. Source: include/uapi/linux/fs.h.
#pragma once
#include <linux/types.h>
#include <sys/ioctl.h>

#define EDM_PROCMAP_PERMS 0x0f  // of vma_flags: read, write, execute, shared
#define EDM_PROCMAP_SHARED 0x08
#define EDM_PROCMAP_COVERING_OR_NEXT 0x10
struct edm_procmap_query {
    __u64 size, query_flags, query_addr;
    __u64 vma_start, vma_end, vma_flags, vma_page_size, vma_offset, inode;
    __u32 dev_major, dev_minor, vma_name_size, build_id_size;
    __u64 vma_name_addr, build_id_addr;
};
#define EDM_PROCMAP_QUERY _IOWR('f', 17, struct edm_procmap_query)
