// Switching between stacks: what the threads of a block do whenever one of them waits for another.
//
// The C library's ucontext asks the kernel at each switch, which is most of what the tests would then do; so on x86-64
// ELF systems a switch is a few instructions.

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if __has_include(<sanitizer/asan_interface.h>)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_UNPOISON_MEMORY_REGION(address, size) static_cast<void>(0)
#endif

namespace host {

using Entry = void (*)();

} // namespace host

#if defined(__ELF__) && defined(__x86_64__)

// Saves the registers that a call keeps on the stack, and the stack pointer in `*from`; takes them from `to`.
extern "C" void host_switch(void** from, void* to);
asm(R"(
    .text
    .globl host_switch
    .type host_switch, @function
host_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size host_switch, . - host_switch
)");

namespace host {

struct Context {
    void* stack_pointer;

    // A context that calls `entry`, which never returns.
    void prepare(unsigned char* stack, std::size_t bytes, Entry entry) {
        // Six registers, the address that `ret` takes, and one word: at a function's first instruction the stack is a
        // word off a multiple of 16.
        const std::uintptr_t end = reinterpret_cast<std::uintptr_t>(stack + bytes) & ~std::uintptr_t(15);
        auto* const words = reinterpret_cast<std::uintptr_t*>(end) - 8;
        std::memset(words, 0, 8 * sizeof *words);
        words[6] = reinterpret_cast<std::uintptr_t>(entry);
        stack_pointer = words;
    }

    static void change(Context& from, Context& to) { host_switch(&from.stack_pointer, to.stack_pointer); }
};

} // namespace host

#else

#include <ucontext.h>

namespace host {

struct Context {
    ucontext_t context;

    void prepare(unsigned char* stack, std::size_t bytes, Entry entry) {
        getcontext(&context);
        context.uc_stack.ss_sp = stack;
        context.uc_stack.ss_size = bytes;
        context.uc_link = nullptr;
        makecontext(&context, entry, 0);
    }

    static void change(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};

} // namespace host

#endif
