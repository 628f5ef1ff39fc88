#if defined(__linux__)
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "program.h"

uint64_t ml_hash(uint64_t hash, const void *data, size_t bytes) {
  const unsigned char *byte = data;
  for (size_t i = 0; i < bytes; i++) hash = (hash ^ byte[i]) * 0x100000001b3u;
  return hash;
}

#if defined(_WIN32) /* where there is no driver, either */

bool ml_cache_folder(const char *given, char folder[ML_PATH_BYTES]) { return (void)given, (void)folder, false; }

void *ml_cache_read(const char *folder, const char *key, size_t *bytes) {
  return (void)folder, (void)key, (void)bytes, NULL;
}

void ml_cache_write(const char *folder, const char *key, const void *data, size_t bytes) {
  (void)folder, (void)key, (void)data, (void)bytes;
}

#else

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- the folder ---- */

static const char *variable(const char *name) {
  const char *value = getenv(name);
  return value && *value ? value : NULL;
}

static bool path(char result[ML_PATH_BYTES], const char *folder, const char *rest) {
  int length = snprintf(result, ML_PATH_BYTES, "%s%s", folder, rest);
  return length > 0 && length < ML_PATH_BYTES;
}

bool ml_cache_folder(const char *given, char folder[ML_PATH_BYTES]) {
  if (!given) given = variable("MOELORA_CACHE");
  if (given) return path(folder, given, "");
  const char *caches = variable("XDG_CACHE_HOME"), *home = variable("HOME");
  if (caches && *caches == '/') return path(folder, caches, "/moelora"); /* others the specification says to ignore */
  return home && path(folder, home, "/.cache/moelora");
}

/* Makes a folder and those above it, for their owner alone, as far as they are missing. */
static void make_folder(const char *folder) {
  char part[ML_PATH_BYTES];
  if (!path(part, folder, "")) return;
  for (char *end = part + 1; *end; end++)
    if (*end == '/') {
      *end = '\0';
      mkdir(part, 0700);
      *end = '/';
    }
  mkdir(part, 0700);
}

/* ---- files ---- */

/* The key is in it whole, so that two with one hash are told apart, and a reader sees what a file is. */
typedef struct {
  char magic[8];
  uint64_t bytes, checksum; /* of what follows */
  char key[ML_KEY_BYTES];   /* padded with zeros */
} header;

static bool header_of(header *h, const char *key, const void *data, size_t bytes) {
  *h = (header){.magic = "moelora1", .bytes = bytes, .checksum = ml_hash(ML_HASH_START, data, bytes)};
  size_t length = strlen(key);
  if (length >= ML_KEY_BYTES) return false;
  memcpy(h->key, key, length);
  return true;
}

static bool file_of(char file[ML_PATH_BYTES], const char *folder, const char *key, const char *ending) {
  char name[64];
  snprintf(name, sizeof name, "/%016llx%s", (unsigned long long)ml_hash(ML_HASH_START, key, strlen(key)), ending);
  return path(file, folder, name);
}

/* Nobody else could have written it. Names may be links or pipes; opening one must not wait. */
static int open_own(const char *file, size_t *bytes) {
  int fd = open(file, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
  struct stat facts;
  if (fd >= 0 && fstat(fd, &facts) == 0 && S_ISREG(facts.st_mode) && facts.st_uid == geteuid() &&
      !(facts.st_mode & (S_IWGRP | S_IWOTH))) {
    *bytes = (size_t)facts.st_size;
    return fd;
  }
  if (fd >= 0) close(fd);
  return -1;
}

static bool read_all(int fd, char *data, size_t bytes) {
  while (bytes > 0) {
    ssize_t n = read(fd, data, bytes);
    if (n == 0 || (n < 0 && errno != EINTR)) return false;
    if (n > 0) data += n, bytes -= (size_t)n;
  }
  return true;
}

static bool write_all(int fd, const void *from, size_t bytes) {
  const char *data = from;
  while (bytes > 0) {
    ssize_t n = write(fd, data, bytes);
    if (n < 0 && errno != EINTR) return false;
    if (n > 0) data += n, bytes -= (size_t)n;
  }
  return true;
}

void *ml_cache_read(const char *folder, const char *key, size_t *bytes) {
  char file[ML_PATH_BYTES];
  size_t all = 0;
  int fd = file_of(file, folder, key, ".cubin") ? open_own(file, &all) : -1;
  if (fd < 0) return NULL;
  header stored, expected;
  char *data = all > sizeof stored ? malloc(all - sizeof stored) : NULL;
  bool good = data && read_all(fd, (char *)&stored, sizeof stored) && read_all(fd, data, all - sizeof stored) &&
              header_of(&expected, key, data, all - sizeof stored) && memcmp(&stored, &expected, sizeof stored) == 0;
  close(fd);
  if (!good) {
    free(data);
    return NULL;
  }
  *bytes = all - sizeof stored;
  return data;
}

/* Under a name of its own first, so that readers see the old file or the whole new one. */
void ml_cache_write(const char *folder, const char *key, const void *data, size_t bytes) {
  header h;
  char file[ML_PATH_BYTES], temporary[ML_PATH_BYTES];
  if (!header_of(&h, key, data, bytes) || !file_of(file, folder, key, ".cubin") ||
      !file_of(temporary, folder, key, ".XXXXXX"))
    return;
  make_folder(folder);
  int fd = mkstemp(temporary);
  if (fd < 0) return;
  bool written = write_all(fd, &h, sizeof h) && write_all(fd, data, bytes);
  written = close(fd) == 0 && written;
  if (!written || rename(temporary, file) != 0) unlink(temporary);
}

#endif
