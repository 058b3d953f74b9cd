/*
 * Preloaded into the kernels of User-mode Linux (ld.so(8), LD_PRELOAD): their programs' vector registers on processors
 * with more of them than those kernels know.
 *
 * The kernels keep the extended registers of a program in 2696 bytes, which ends with AVX-512 and protection keys, and
 * give them back by ptrace(2), PTRACE_SETREGSET of NT_X86_XSTATE. Since Linux 5.16 a host takes only all of the state
 * that its processor has: 11008 bytes where there is AMX. To others it says EFAULT, and the kernel's first program ends
 * with SIGSEGV. So the rest is added here. It is never looked at: a program must ask the host for AMX (arch_prctl(2),
 * ARCH_REQ_XCOMP_PERM), which a guest's cannot, and without it the state's header says that this part is unused.
 *
 * They also call the handlers of signals with the flags of what the signal has interrupted. By the ABI of x86-64 the direction
 * flag is clear where a function begins: with one that is set, string instructions of the handler go backwards through
 * memory. Programs set it to copy backwards, as memmove(3) of musl does. Linux on a processor clears it, and the trap flag
 * too, without which a program that steps through itself would step through its handler.
 *
 * Compiled by tools/build_native.py to libregset.so.1 beside it. Sources: ptrace(2); the kernel's arch/x86/kernel/fpu/regset.c
 * and Documentation/arch/x86/xstate.rst; handle_signal() in its arch/x86/kernel/signal.c, setup_signal_stack_si() in its
 * arch/x86/um/signal.c.
 */

typedef unsigned long size_t;

struct iovec {
	void *base;
	size_t len;
};

typedef long call(long request, long pid, void *addr, void *data);
extern void *dlsym(void *handle, const char *name);

#define RTLD_NEXT ((void *)-1L)
#define PTRACE_SETREGS 13
#define PTRACE_GETREGSET 0x4204
#define PTRACE_SETREGSET 0x4205
#define NT_X86_XSTATE 0x202

/* Places in struct user_regs_struct, <sys/user.h>. */
enum { RAX = 10, RDX = 12, RSI = 13, RDI = 14, FLAGS = 18, RSP = 19 };
#define TRAP 0x100UL
#define DIRECTION 0x400UL
#define SIGNALS 64
#define TO_UCONTEXT 8UL      /* in the kernel's struct rt_sigframe, behind the address to return to */
#define TO_SIGINFO (8UL + 304) /* behind that struct ucontext */

/* A power of two beyond what any processor has; a state that did not fit would be refused as before. */
static char state[32768] __attribute__((aligned(64)));
static size_t whole;
static call *real;

/* Whether a handler is called: its three arguments are a signal, and two places in the frame at the stack's end. */
static int enters_handler(const unsigned long *regs)
{
	return regs[RDX] == regs[RSP] + TO_UCONTEXT && regs[RSI] == regs[RSP] + TO_SIGINFO && regs[RAX] == 0 &&
	       regs[RDI] - 1 < SIGNALS;
}

__attribute__((visibility("default"))) long ptrace(long request, long pid, void *addr, void *data)
{
	struct iovec *given = data, full = { state, sizeof(state) };

	if (!real)
		real = (call *)dlsym(RTLD_NEXT, "ptrace");
	if (request == PTRACE_SETREGS) {
		unsigned long *regs = data;

		if (regs[FLAGS] & (DIRECTION | TRAP) && enters_handler(regs))
			regs[FLAGS] &= ~(DIRECTION | TRAP);
	}
	if (request != PTRACE_SETREGSET || addr != (void *)NT_X86_XSTATE)
		return real(request, pid, addr, data);
	if (!whole) {
		if (real(PTRACE_GETREGSET, pid, addr, &full) < 0)
			return -1;
		whole = full.len;
	}
	if (given->len >= whole)
		return real(request, pid, addr, data);
	for (size_t i = 0; i < given->len; i++)
		state[i] = ((char *)given->base)[i];
	full.len = whole;
	return real(request, pid, addr, &full);
}
