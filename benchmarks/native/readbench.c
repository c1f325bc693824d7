// SPDX-License-Identifier: GPL-2.0-only
/*
 * readbench - time reads of one file, without an interpreter in the way
 *
 * readbench FILE pread BLOCK BYTES   read BYTES by pread() of BLOCK, round and round
 * readbench FILE mmap 4096 BYTES     touch one byte of each page of fresh mappings
 *
 * Prints nanoseconds a call or page touched.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static double now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e9 + t.tv_nsec;
}

static long by_pread(int fd, off_t size, size_t block, long long bytes)
{
	char *buffer = malloc(block);
	long calls = 0;
	off_t at = 0;

	if (!buffer)
		die("malloc");
	for (; bytes > 0; bytes -= block, calls++) {
		if (pread(fd, buffer, block, at) != (ssize_t)block)
			die("pread");
		at += block;
		if (at + (off_t)block > size)
			at = 0;
	}
	free(buffer);
	return calls;
}

static long by_mmap(int fd, off_t size, long long bytes)
{
	unsigned sum = 0;
	long pages = 0;

	for (; bytes > 0; bytes -= size) {
		volatile char *map = mmap(NULL, size, PROT_READ, MAP_SHARED, fd, 0);

		if (map == MAP_FAILED)
			die("mmap");
		for (off_t at = 0; at < size; at += 4096, pages++)
			sum += map[at];
		munmap((void *)map, size);
	}
	fprintf(stderr, "%s", sum == 1 ? " " : ""); /* the sum must be used */
	return pages;
}

int main(int argc, char **argv)
{
	struct stat st;
	double begun, ended;
	long calls;
	int fd;

	if (argc != 5) {
		fprintf(stderr, "usage: readbench FILE pread|mmap BLOCK BYTES\n");
		return 2;
	}
	fd = open(argv[1], O_RDONLY);
	if (fd < 0 || fstat(fd, &st))
		die(argv[1]);
	begun = now_ns();
	if (!strcmp(argv[2], "mmap"))
		calls = by_mmap(fd, st.st_size, atoll(argv[4]));
	else
		calls = by_pread(fd, st.st_size, atoll(argv[3]), atoll(argv[4]));
	ended = now_ns();
	printf("%.2f\n", (ended - begun) / calls);
	return 0;
}
