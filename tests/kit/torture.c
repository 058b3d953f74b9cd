/*
 * Whether programs keep their registers: processes of threads load all that there are, spin or make a system call, and look
 * at them again, while timers of theirs interrupt them by handlers that load others.
 *
 *     torture SECONDS
 *
 * What is checked: the vector registers, the x87 stack and the control words (by XRSTOR and XSAVE, all of XCR0 but AMX and
 * protection keys), the general registers, the flags and the thread pointer; across the timers' signals, other threads and
 * processes, system calls that wait and are interrupted, and fork(2), whose child has to have its parent's. And that handlers
 * find the direction flag clear.
 *
 * Handlers leave what came with AVX-512 as it was: the signal frames of User-mode Linux to 6.12 have no room for it.
 *
 * Ends after SECONDS, when each thread has done everything at least LEAST times. Exit status 0, and a line on stdout that is
 * the same wherever it runs; or 1, and on stderr the register that has changed. Sources: Intel's Software Developer's Manual,
 * volume 1, chapter 13 (XSAVE); timer_create(2), signal(7).
 */
#define _GNU_SOURCE
#include <cpuid.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PROCESSES 6
#define THREADS 3
#define LEAST 20
#define TURNS 200000L     /* of a loop without a system call: some 0.1 ms */
#define TICK_NS 3000000L  /* of each thread's timer */
#define REPORT_S 60
#define KEPT 0xe7UL       /* x87, SSE, AVX, AVX-512; not AMX, protection keys and bounds */
#define CLOBBERED 0x7UL
#define DIRECTION 0x400UL /* the flag by which string instructions go backwards: clear where functions begin */
#define AREA 4096         /* beyond all of KEPT in the standard format: 2688 bytes */

enum { RAX, RBX, RDX, RSI, RDI, RBP, R8, R9, R10, R11, R12, R13, R14, R15, FLAGS, GENERAL };
static const char *const names[GENERAL] = { "rax", "rbx", "rdx", "rsi", "rdi", "rbp", "r8", "r9",
					    "r10", "r11", "r12", "r13", "r14", "r15", "flags" };

struct held {
	unsigned long general[GENERAL];
	uint8_t area[AREA] __attribute__((aligned(64)));
};

/*
 * spin: load all registers from `in`, count down, store them to `out`. call: the same with one system call, whose number is
 * in RAX; it changes RAX, RCX and R11.
 */
void spin(const struct held *in, struct held *out, unsigned long mask, long turns);
void call(const struct held *in, struct held *out, unsigned long mask, long unused);

#define OFFSET_OF_AREA "128"
#define HOLD(NAME, WORK)                                                                        \
	".globl " NAME "\n" NAME ":\n"                                                          \
	"push %rbx; push %rbp; push %r12; push %r13; push %r14; push %r15\n"                    \
	"push %rsi; push %rdx\n" /* where to, mask */                                           \
	"sub $16, %rsp; stmxcsr (%rsp); fnstcw 4(%rsp)\n"                                       \
	"mov %edx, %eax; xor %edx, %edx; xrstor64 " OFFSET_OF_AREA "(%rdi)\n"                   \
	"mov 0(%rdi), %rax; mov 8(%rdi), %rbx; mov 16(%rdi), %rdx; mov 24(%rdi), %rsi\n"        \
	"mov 40(%rdi), %rbp; mov 48(%rdi), %r8; mov 56(%rdi), %r9; mov 64(%rdi), %r10\n"        \
	"mov 72(%rdi), %r11; mov 80(%rdi), %r12; mov 88(%rdi), %r13; mov 96(%rdi), %r14\n"      \
	"mov 104(%rdi), %r15; push 112(%rdi); popf; mov 32(%rdi), %rdi\n" WORK                  \
	"pushf; push %r15; push %r14; push %r13; push %r12; push %r11; push %r10; push %r9\n"   \
	"push %r8; push %rbp; push %rdi; push %rsi; push %rdx; push %rbx; push %rax; cld\n"     \
	"mov 144(%rsp), %rdi; mov 136(%rsp), %rax; xor %edx, %edx\n"                            \
	"xsave64 " OFFSET_OF_AREA "(%rdi)\n"                                                    \
	"pop (%rdi); pop 8(%rdi); pop 16(%rdi); pop 24(%rdi); pop 32(%rdi); pop 40(%rdi)\n"     \
	"pop 48(%rdi); pop 56(%rdi); pop 64(%rdi); pop 72(%rdi); pop 80(%rdi); pop 88(%rdi)\n"  \
	"pop 96(%rdi); pop 104(%rdi); pop 112(%rdi)\n"                                          \
	"vzeroupper; fninit; ldmxcsr (%rsp); fldcw 4(%rsp); add $16, %rsp\n"                    \
	"pop %rdx; pop %rsi; pop %r15; pop %r14; pop %r13; pop %r12; pop %rbp; pop %rbx; ret\n"

__asm__(".text\n" /* neither LEA nor JRCXZ touches the flags */
	HOLD("spin", "1: lea -1(%rcx), %rcx; jrcxz 2f; jmp 1b; 2:\n")
	HOLD("call", "syscall\n"));

_Static_assert(__builtin_offsetof(struct held, area) == 128, "OFFSET_OF_AREA");

struct shared {
	volatile int stop, wrong, backwards;
	volatile unsigned long rounds[PROCESSES][THREADS], ticks[PROCESSES][THREADS], forks[PROCESSES];
};

static struct shared *shared;
static unsigned long kept, clobbered;
static struct component {
	unsigned offset, size;
} components[8];
static struct held others; /* what handlers load */
static int ring[PROCESSES][2];
static int process;
static __thread int thread __attribute__((tls_model("initial-exec")));
static __thread uintptr_t self __attribute__((tls_model("initial-exec")));

static void fill(struct held *held, uint64_t seed)
{
	uint8_t *area = held->area;

	for (int i = 0; i < GENERAL; i++)
		held->general[i] = seed * 0x9e3779b97f4a7c15UL + i * 0x0101010101010101UL;
	held->general[FLAGS] = 0x202 | (held->general[FLAGS] & 0xcd5); /* interrupts on; any of CF PF AF ZF SF DF OF */
	memset(area, 0, AREA);
	*(uint16_t *)area = 0x037f ^ ((seed & 3) << 10); /* x87 control: the rounding */
	area[4] = 0xff;                                  /* all eight of the x87 stack are in use */
	*(uint32_t *)(area + 24) = 0x1f80 ^ ((seed >> 2 & 3) << 13);
	for (int i = 0; i < 8; i++) {
		memcpy(area + 32 + 16 * i, &held->general[i], 8);
		area[32 + 16 * i + 7] |= 0x80; /* a normal number */
		*(uint16_t *)(area + 32 + 16 * i + 8) = 0x3fff + i;
	}
	for (unsigned at = 160; at < 416; at += 8)
		*(uint64_t *)(area + at) = seed * 0xbf58476d1ce4e5b9UL + at;
	for (int i = 2; i < 8; i++)
		for (unsigned at = 0; kept >> i & 1 && at < components[i].size; at += 8)
			*(uint64_t *)(area + components[i].offset + at) = seed * 0x94d049bb133111ebUL + at + i;
	*(uint64_t *)(area + 512) = kept;
}

static void differ(const char *what, int number, const void *was, const void *is, unsigned size)
{
	const uint8_t *a = was, *b = is;

	if (!memcmp(a, b, size))
		return;
	shared->wrong = shared->stop = 1;
	fprintf(stderr, "process %d, thread %d: %s", process, thread, what);
	if (number >= 0)
		fprintf(stderr, " %d", number);
	for (unsigned i = 0; i < size; i++)
		if (a[i] != b[i])
			fprintf(stderr, " [%u] %02x->%02x", i, a[i], b[i]);
	fputc('\n', stderr);
}

static void compare(const struct held *in, const struct held *out, int called)
{
	for (int i = 0; i < GENERAL; i++)
		if (!called || (i != RAX && i != R11))
			differ(names[i], -1, &in->general[i], &out->general[i], 8);
	differ("x87 control", -1, in->area, out->area, 2);
	differ("x87 in use", -1, in->area + 4, out->area + 4, 1);
	differ("mxcsr", -1, in->area + 24, out->area + 24, 4);
	for (int i = 0; i < 8; i++)
		differ("st", i, in->area + 32 + 16 * i, out->area + 32 + 16 * i, 10);
	for (int i = 0; i < 16; i++)
		differ("xmm", i, in->area + 160 + 16 * i, out->area + 160 + 16 * i, 16);
	for (int i = 2; i < 8; i++)
		if (kept >> i & 1)
			differ("state", i, in->area + components[i].offset, out->area + components[i].offset,
			       components[i].size);
}

__attribute__((target("general-regs-only"))) static long raw(long number)
{
	__asm__ volatile("syscall" : "+a"(number) : : "rcx", "r11", "memory");
	return number;
}

__attribute__((target("general-regs-only"))) static void tick(int number)
{
	unsigned long low = clobbered, high = 0, before, flags;

	(void)number;
	__asm__ volatile("pushf; pop %0; cld" : "=r"(flags) : : "memory", "cc");
	if (flags & DIRECTION)
		shared->backwards = shared->wrong = shared->stop = 1;
	before = shared->ticks[process][thread]++;
	__asm__ volatile("xrstor64 %0" : : "m"(others.area), "a"(low), "d"(high));
	if (before % 3 == 0)
		raw(SYS_sched_yield);
	if (before % 7 == 0)
		raw(SYS_getppid);
}

static void start_timer(void)
{
	struct itimerspec every = { { 0, TICK_NS }, { 0, TICK_NS } };
	struct sigevent event = { 0 };
	timer_t timer;

	event.sigev_notify = SIGEV_THREAD_ID;
	event.sigev_signo = SIGUSR1 + thread % 2 * (SIGUSR2 - SIGUSR1);
	event._sigev_un._tid = gettid();
	if (timer_create(CLOCK_MONOTONIC, &event, &timer) || timer_settime(timer, 0, &every, NULL)) {
		perror("timer");
		shared->wrong = shared->stop = 1;
	}
}

static void forked(struct held *in, struct held *out, uint64_t seed)
{
	int status;

	fill(in, seed);
	in->general[RAX] = SYS_fork;
	call(in, out, kept, 0);
	compare(in, out, 1);
	if (!out->general[RAX]) {
		fill(in, ~seed);
		spin(in, out, kept, TURNS / 10);
		compare(in, out, 0);
		_exit(shared->wrong);
	}
	while (waitpid((pid_t)out->general[RAX], &status, 0) < 0 && errno == EINTR)
		;
	if (status) {
		fprintf(stderr, "process %d: a child of fork ended with status %#x\n", process, status);
		shared->wrong = shared->stop = 1;
	}
	shared->forks[process]++;
}

/* One byte goes round all processes, so that each of them waits for others most of the time. */
static void passed_on(struct held *in, struct held *out, uint64_t seed)
{
	char byte;

	fill(in, seed);
	in->general[RAX] = SYS_read;
	in->general[RDI] = ring[process][0];
	in->general[RSI] = (unsigned long)&byte;
	in->general[RDX] = 1;
	call(in, out, kept, 0);
	compare(in, out, 1);
	if (out->general[RAX] != 1 && !shared->stop) {
		fprintf(stderr, "process %d: read: %ld\n", process, (long)out->general[RAX]);
		shared->wrong = shared->stop = 1;
	}
	if (write(ring[(process + 1) % PROCESSES][1], "t", 1) != 1)
		perror("write");
}

static int enough(void)
{
	if (!shared->stop)
		return 0;
	return shared->wrong || shared->rounds[process][thread] >= LEAST;
}

static void *work(void *number)
{
	struct held *in = aligned_alloc(64, sizeof *in), *out = aligned_alloc(64, sizeof *out);
	stack_t stack = { 0 };

	thread = (int)(long)number;
	self = (uintptr_t)&thread;
	if (thread == 1) { /* handlers on a stack of their own */
		stack.ss_size = 65536;
		stack.ss_sp = malloc(stack.ss_size);
		sigaltstack(&stack, NULL);
	}
	start_timer();
	for (uint64_t round = 1; !enough(); round++) {
		uint64_t seed = (round * PROCESSES + process) * THREADS + thread;

		fill(in, seed);
		if (round % 2) {
			spin(in, out, kept, TURNS);
			compare(in, out, 0);
		} else {
			in->general[RAX] = round % 4 ? SYS_sched_yield : SYS_getppid;
			call(in, out, kept, 0);
			compare(in, out, 1);
		}
		if (self != (uintptr_t)&thread)
			differ("thread pointer", -1, &self, &(uintptr_t){ (uintptr_t)&thread }, sizeof self);
		if (thread == 2)
			passed_on(in, out, ~seed);
		if (thread == 0 && round % 100 == 1)
			forked(in, out, ~seed);
		shared->rounds[process][thread] = round;
	}
	/* Nobody is left waiting for a byte. */
	while (thread == 2 && write(ring[(process + 1) % PROCESSES][1], "t", 1) != 1 && errno == EINTR)
		;
	return NULL;
}

static int child(void)
{
	struct sigaction action = { .sa_handler = tick, .sa_flags = SA_RESTART | SA_ONSTACK };
	pthread_t threads[THREADS];

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	sigaction(SIGUSR1, &action, NULL);
	sigaction(SIGUSR2, &action, NULL);
	for (long i = 1; i < THREADS; i++)
		if (pthread_create(&threads[i], NULL, work, (void *)i))
			return 1;
	work(0);
	for (int i = 1; i < THREADS; i++)
		pthread_join(threads[i], NULL);
	return shared->wrong;
}

static unsigned long sum(volatile unsigned long (*counts)[THREADS])
{
	unsigned long all = 0;

	for (int i = 0; i < PROCESSES * THREADS; i++)
		all += counts[i / THREADS][i % THREADS];
	return all;
}

static void find_components(void)
{
	unsigned a, b, c, d, low, high;

	__cpuid(1, a, b, c, d);
	if (!(c & bit_OSXSAVE) || !(c & bit_AVX)) {
		fprintf(stderr, "this processor has no AVX\n");
		exit(2);
	}
	__asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
	kept = low & KEPT;
	clobbered = low & CLOBBERED;
	for (int i = 2; i < 8; i++)
		if (kept >> i & 1) {
			__cpuid_count(0xd, i, a, b, c, d);
			components[i] = (struct component){ b, a };
		}
}

int main(int argc, char **argv)
{
	long seconds = argc > 1 ? atol(argv[1]) : 10;
	struct timespec began, now;
	pid_t children[PROCESSES];
	int failed = 0;

	find_components();
	shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	fill(&others, 0xfeed);
	for (int i = 0; i < PROCESSES; i++)
		if (pipe(ring[i]))
			return 2;
	for (process = 0; process < PROCESSES; process++) {
		children[process] = fork();
		if (children[process] == 0)
			return child();
	}
	if (write(ring[0][1], "t", 1) != 1)
		return 2;
	clock_gettime(CLOCK_MONOTONIC, &began);
	for (long told = 0, past = 0; past < seconds && !shared->stop; usleep(100000)) {
		clock_gettime(CLOCK_MONOTONIC, &now);
		past = now.tv_sec - began.tv_sec;
		if (past / REPORT_S > told) {
			told = past / REPORT_S;
			fprintf(stderr, "%ld s: %lu rounds, %lu signals\n", past, sum(shared->rounds), sum(shared->ticks));
		}
	}
	shared->stop = 1;
	for (int i = 0; i < PROCESSES; i++) {
		int status;

		if (waitpid(children[i], &status, 0) < 0 || status) {
			fprintf(stderr, "process %d ended with status %#x\n", i, status);
			failed = 1;
		}
		failed |= !shared->forks[i];
		for (int j = 0; j < THREADS; j++)
			failed |= shared->rounds[i][j] < LEAST || !shared->ticks[i][j];
	}
	fprintf(stderr, "%lu rounds, %lu signals\n", sum(shared->rounds), sum(shared->ticks));
	if (shared->backwards)
		fprintf(stderr, "a handler was called with the direction flag of what it interrupted\n");
	if (failed || shared->wrong)
		return 1;
	printf("%d processes of %d threads kept state %#lx\n", PROCESSES, THREADS, kept);
	return 0;
}
