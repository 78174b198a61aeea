/* Lets Debian 13's user-mode kernel run on processors with AMX (Sapphire Rapids and later).
 *
 * Linux 6.12's user-mode port keeps 2696 bytes of a process's vector registers (arch/x86/um/user-offsets.c). The outer
 * kernel refuses to set less than all of them (EFAULT, arch/x86/kernel/fpu/regset.c), and with AMX that is 11008 bytes:
 * the first process of a host would die. What the user-mode kernel does not know is the tiles' state, which no process
 * of it can have, since none got the permission. So it is set to its initial state: zeros, and absent from the header.
 * From Linux 6.13 on the size is asked for, and this file can go.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/uio.h>

static unsigned char all_registers[64 * 1024]; /* one thread of one process traces */

long ptrace(enum __ptrace_request request, ...)
{
	static long (*libc_ptrace)(enum __ptrace_request, ...);
	static size_t whole;
	struct iovec buffer = {all_registers, sizeof all_registers}, *given;
	void *address, *data;
	long done;
	int process;
	va_list rest;

	va_start(rest, request);
	process = va_arg(rest, int);
	address = va_arg(rest, void *);
	data = va_arg(rest, void *);
	va_end(rest);
	if (!libc_ptrace)
		libc_ptrace = (long (*)(enum __ptrace_request, ...))dlsym(RTLD_NEXT, "ptrace");
	if ((request != PTRACE_GETREGSET && request != PTRACE_SETREGSET) || (long)address != NT_X86_XSTATE)
		return libc_ptrace(request, process, address, data);
	if (!whole) {
		done = libc_ptrace(PTRACE_GETREGSET, process, address, &buffer);
		if (done < 0)
			return done;
		whole = buffer.iov_len;
		memset(all_registers, 0, sizeof all_registers);
	}
	given = data;
	if (request == PTRACE_GETREGSET || given->iov_len >= whole)
		return libc_ptrace(request, process, address, data);
	memcpy(all_registers, given->iov_base, given->iov_len);
	buffer.iov_len = whole;
	return libc_ptrace(request, process, address, &buffer);
}
