/*
 * katapod-proxy NAME...: stands on the host for a process in a guest. Whoever started the container with an OCI command
 * line waits for this process, looks at its namespaces and its cgroup, and sends it signals.
 *
 * Descriptor 3 is a connection (stream) to the supervisor, which holds the guest. Others may be open, or not:
 *
 *	4	the network namespace to be in
 *	5	the mount namespace: the container's files, as the host has them
 *	6	the PID namespace, of another proxy; else it gets a new one, so that its /proc shows what belongs to it
 *	7	a terminal, to be its controlling one
 *
 * It forks once for the PID namespace, as a sibling, so that its parent is who executed this. The arguments are for ps(1)
 * alone.
 *
 *	once			its process id, four bytes in the host's order
 *	proxy -> supervisor	0: in place; else the number of a signal that came
 *	supervisor -> proxy	'x' N: end with exit status N; 's' N: end by signal N
 *
 * The end of the connection means that the supervisor is gone, and with it the guest: then the end is by SIGKILL. The
 * supervisor for its part takes the end of the proxy for a wish to end the process.
 *
 * No libc, so that it costs the host a few pages. Compiled by tools/build_native.py to katapod-proxy beside it.
 * Sources: signalfd(2), setns(2), and the kernel's include/uapi/asm-generic/signal.h for what the calls take.
 */

#define SYS_read 0
#define SYS_write 1
#define SYS_close 3
#define SYS_poll 7
#define SYS_rt_sigaction 13
#define SYS_rt_sigprocmask 14
#define SYS_ioctl 16
#define SYS_getpid 39
#define SYS_clone 56
#define SYS_kill 62
#define SYS_fcntl 72
#define SYS_setsid 112
#define SYS_mount 165
#define SYS_exit_group 231
#define SYS_unshare 272
#define SYS_signalfd4 289
#define SYS_pipe2 293
#define SYS_prlimit64 302
#define SYS_setns 308

#define SUPERVISOR 3
#define NETNS 4
#define MOUNTS 5
#define PIDS 6
#define TERMINAL 7
#define F_GETFD 1
#define CLONE_PARENT 0x00008000
#define CLONE_NEWNS 0x00020000
#define CLONE_NEWPID 0x20000000
#define CLONE_NEWNET 0x40000000
#define TIOCSCTTY 0x540E
#define SIGCHLD 17
#define SIG_SETMASK 2
#define SIGKILL 9
#define RLIMIT_CORE 4
#define POLLIN 1
#define FAILED 125

struct pollfd {
	int fd;
	short events, revents;
};

struct siginfo { /* struct signalfd_siginfo */
	unsigned int number;
	char rest[124];
};

static long call(long number, long a, long b, long c, long d)
{
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = 0;
	long result;

	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8)
			 : "rcx", "r11", "memory");
	return result;
}

static void leave(int status)
{
	for (;;)
		call(SYS_exit_group, status, 0, 0, 0);
}

/*
 * By the signal itself, so that who waits sees it; without a core file, which would be of this process. The first process
 * of a PID namespace cannot do that (pid_namespaces(7)), and ends with the status that a shell has for it.
 */
static void die(int number)
{
	unsigned long none = 0, limits[2] = { 0, 0 }, standard[4] = { 0, 0, 0, 0 };

	call(SYS_prlimit64, 0, RLIMIT_CORE, (long)limits, 0);
	call(SYS_rt_sigaction, number, (long)standard, 0, 8);
	call(SYS_rt_sigprocmask, SIG_SETMASK, (long)&none, 0, 8);
	call(SYS_kill, call(SYS_getpid, 0, 0, 0, 0), number, 0, 0);
	leave(128 + number);
}

static void tell(unsigned char number)
{
	call(SYS_write, SUPERVISOR, (long)&number, 1, 0);
}

static void obey(void)
{
	unsigned char order[2];
	long size = call(SYS_read, SUPERVISOR, (long)order, 2, 0);

	if (size == 1)
		size += call(SYS_read, SUPERVISOR, (long)(order + 1), 1, 0) == 1;
	if (size != 2)
		die(SIGKILL);
	if (order[0] == 's')
		die(order[1]);
	leave(order[1]);
}

static int is_open(int fd)
{
	return call(SYS_fcntl, fd, F_GETFD, 0, 0) >= 0;
}

static void enter(int fd, long kind)
{
	if (!is_open(fd))
		return;
	if (call(SYS_setns, fd, kind, 0, 0) < 0)
		leave(FAILED);
	call(SYS_close, fd, 0, 0, 0);
}

/* Returns in the new process, once the old one has told which that is and has gone. */
static void fork_into_namespaces(void)
{
	int gone[2], pid;

	enter(NETNS, CLONE_NEWNET);
	enter(MOUNTS, CLONE_NEWNS);
	if (!is_open(PIDS) && call(SYS_unshare, CLONE_NEWPID, 0, 0, 0) < 0)
		leave(FAILED);
	enter(PIDS, CLONE_NEWPID);
	if (call(SYS_pipe2, (long)gone, 0, 0, 0) < 0)
		leave(FAILED);
	pid = call(SYS_clone, CLONE_PARENT | SIGCHLD, 0, 0, 0);
	if (pid < 0)
		leave(FAILED);
	if (pid > 0) {
		call(SYS_write, SUPERVISOR, (long)&pid, sizeof(pid), 0);
		leave(0);
	}
	call(SYS_close, gone[1], 0, 0, 0);
	call(SYS_read, gone[0], (long)&pid, 1, 0);
	call(SYS_close, gone[0], 0, 0, 0);
}

__attribute__((used)) static void stand(void)
{
	unsigned long all = ~0ul;
	struct siginfo signal;
	struct pollfd places[2] = { { SUPERVISOR, POLLIN, 0 }, { -1, POLLIN, 0 } };
	int mounts = is_open(MOUNTS) && !is_open(PIDS); /* a mount namespace that is for this PID namespace */

	call(SYS_rt_sigprocmask, SIG_SETMASK, (long)&all, 0, 8);
	fork_into_namespaces();
	call(SYS_setsid, 0, 0, 0, 0);
	if (is_open(TERMINAL)) {
		call(SYS_ioctl, TERMINAL, TIOCSCTTY, 0, 0);
		call(SYS_close, TERMINAL, 0, 0, 0);
	}
	if (mounts) /* in a root file system without /proc nobody looks for it */
		call(SYS_mount, (long)"proc", (long)"/proc", (long)"proc", 0);
	places[1].fd = call(SYS_signalfd4, -1, (long)&all, 8, 0);
	if (places[1].fd < 0)
		leave(FAILED);
	tell(0);
	for (;;) {
		call(SYS_poll, (long)places, 2, -1, 0);
		if (places[1].revents && call(SYS_read, places[1].fd, (long)&signal, sizeof(signal), 0) == sizeof(signal))
			tell(signal.number);
		if (places[0].revents)
			obey();
	}
}

/* The kernel gives a stack that is aligned to 16 bytes; a called function expects it so before the call. */
__asm__(".globl _start\n_start:\n\txor %ebp, %ebp\n\tcall stand\n\thlt\n");
