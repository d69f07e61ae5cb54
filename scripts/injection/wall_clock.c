// A wall clock that jumps, for processes that have this library preloaded; scripts/injection/wall_clock.py makes it jump.
//
// $BATON_CHAOS_CLOCK is a file of 64-bit numbers, nanoseconds: the first is added to every process's wall clock, that at index
// <pid> to this process's alone. Monotonic clocks stay as they are, as when the clock of a machine is set. Waits until an
// instant of the wall clock end when the moved clock says so, also those that had begun before it was moved: they look at it
// every SLICE.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define SECOND 1000000000LL
#define SLICE (SECOND / 10)
#define LONG_AGO 500000000  // s; instants before that, in 1985, are not of the wall clock: some waits do not say which clock

static const volatile int64_t zero;
static const volatile int64_t *everybody = &zero, *mine = &zero;

static int (*real_clock_gettime)(clockid_t, struct timespec *);
static int (*real_clock_nanosleep)(clockid_t, int, const struct timespec *, struct timespec *);
static int (*real_cond_timedwait)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
static int (*real_cond_clockwait)(pthread_cond_t *, pthread_mutex_t *, clockid_t, const struct timespec *);
static int (*real_mutex_timedlock)(pthread_mutex_t *, const struct timespec *);
static int (*real_sem_timedwait)(sem_t *, const struct timespec *);
static int (*real_sem_clockwait)(sem_t *, clockid_t, const struct timespec *);
static long (*real_syscall)(long, ...);

static void *find(const char *name) {
  void *found = dlvsym(RTLD_NEXT, name, "GLIBC_2.3.2");  // of condition variables x86-64 has an older kind, too
  return found ? found : dlsym(RTLD_NEXT, name);
}

__attribute__((constructor)) static void begin(void) {
  if (real_syscall) return;
  real_clock_gettime = find("clock_gettime");
  real_clock_nanosleep = find("clock_nanosleep");
  real_cond_timedwait = find("pthread_cond_timedwait");
  real_cond_clockwait = find("pthread_cond_clockwait");
  real_mutex_timedlock = find("pthread_mutex_timedlock");
  real_sem_timedwait = find("sem_timedwait");
  real_sem_clockwait = find("sem_clockwait");
  real_syscall = find("syscall");
  const char *path = getenv("BATON_CHAOS_CLOCK");
  int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
  struct stat file;
  if (fd < 0) return;
  if (!fstat(fd, &file) && file.st_size > (off_t)(getpid() * sizeof(int64_t))) {
    const int64_t *table = mmap(NULL, file.st_size, PROT_READ, MAP_SHARED, fd, 0);
    if (table != MAP_FAILED) everybody = table, mine = table + getpid();
  }
  close(fd);
}

static int64_t in_ns(const struct timespec *time) { return time->tv_sec * SECOND + time->tv_nsec; }

static struct timespec of_ns(int64_t ns) { return (struct timespec){ns / SECOND, ns % SECOND}; }

static int is_wall(clockid_t clock) {
  return clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE || clock == CLOCK_TAI;
}

static int64_t moved_by(void) { return *everybody + *mine; }

static int64_t now(void) {  // by the moved clock
  struct timespec time;
  begin();
  real_clock_gettime(CLOCK_REALTIME, &time);
  return in_ns(&time) + moved_by();
}

// When to look again, by the kernel's clock: at the instant itself, or after a slice.
static struct timespec look(const struct timespec *until) {
  int64_t at = now(), end = in_ns(until);
  if (end > at + SLICE) end = at + SLICE;
  end -= moved_by();
  return of_ns(end > 0 ? end : 0);
}

static int is_over(const struct timespec *until) { return now() >= in_ns(until); }

// --- what time it is ---

int clock_gettime(clockid_t clock, struct timespec *time) {
  begin();
  int failed = real_clock_gettime(clock, time);
  if (!failed && is_wall(clock)) *time = of_ns(in_ns(time) + moved_by());
  return failed;
}

int gettimeofday(struct timeval *restrict time, void *restrict zone) {
  (void)zone;
  struct timespec at = of_ns(now());
  *time = (struct timeval){at.tv_sec, at.tv_nsec / 1000};
  return 0;
}

time_t time(time_t *into) {
  time_t seconds = now() / SECOND;
  if (into) *into = seconds;
  return seconds;
}

int timespec_get(struct timespec *time, int base) {
  if (base == TIME_UTC) *time = of_ns(now());
  return base == TIME_UTC ? base : 0;
}

// --- waits until an instant ---

int clock_nanosleep(clockid_t clock, int flags, const struct timespec *until, struct timespec *left) {
  begin();
  if (!is_wall(clock) || !(flags & TIMER_ABSTIME)) return real_clock_nanosleep(clock, flags, until, left);
  while (!is_over(until)) {
    struct timespec next = look(until);
    int failed = real_clock_nanosleep(clock, flags, &next, left);
    if (failed) return failed;
  }
  return 0;
}

// A condition variable must not be waited for again here: what came in between would be missed. POSIX lets a wait end for nothing.
static int woken(int result, const struct timespec *until) { return result == ETIMEDOUT && !is_over(until) ? 0 : result; }

int pthread_cond_timedwait(pthread_cond_t *restrict cond, pthread_mutex_t *restrict mutex, const struct timespec *restrict until) {
  begin();
  if (until->tv_sec < LONG_AGO) return real_cond_timedwait(cond, mutex, until);
  struct timespec next = look(until);
  return woken(real_cond_timedwait(cond, mutex, &next), until);
}

int pthread_cond_clockwait(pthread_cond_t *cond, pthread_mutex_t *mutex, clockid_t clock, const struct timespec *until) {
  begin();
  if (!is_wall(clock)) return real_cond_clockwait(cond, mutex, clock, until);
  struct timespec next = look(until);
  return woken(real_cond_clockwait(cond, mutex, clock, &next), until);
}

int pthread_mutex_timedlock(pthread_mutex_t *restrict mutex, const struct timespec *restrict until) {
  begin();
  for (;;) {
    struct timespec next = look(until);
    int failed = real_mutex_timedlock(mutex, &next);
    if (failed != ETIMEDOUT || is_over(until)) return failed;
  }
}

int sem_timedwait(sem_t *restrict sem, const struct timespec *restrict until) {
  begin();
  for (;;) {
    struct timespec next = look(until);
    int failed = real_sem_timedwait(sem, &next);
    if (!failed || errno != ETIMEDOUT || is_over(until)) return failed;
  }
}

int sem_clockwait(sem_t *restrict sem, clockid_t clock, const struct timespec *restrict until) {
  begin();
  return is_wall(clock) ? sem_timedwait(sem, until) : real_sem_clockwait(sem, clock, until);
}

// --- the same without the C library ---

long syscall(long number, ...) {
  begin();
  long a[6];
  va_list arguments;
  va_start(arguments, number);
  for (int i = 0; i < 6; i++) a[i] = va_arg(arguments, long);
  va_end(arguments);
  if (number == SYS_clock_gettime) return clock_gettime((clockid_t)a[0], (struct timespec *)a[1]);
  const struct timespec *until = (const struct timespec *)a[3];
  if (number != SYS_futex || !(a[1] & FUTEX_CLOCK_REALTIME) || (a[1] & FUTEX_CMD_MASK) != FUTEX_WAIT_BITSET || !until)
    return real_syscall(number, a[0], a[1], a[2], a[3], a[4], a[5]);
  for (;;) {
    struct timespec next = look(until);
    long failed = real_syscall(number, a[0], a[1], a[2], &next, a[4], a[5]);
    if (!failed || errno != ETIMEDOUT || is_over(until)) return failed;
  }
}
