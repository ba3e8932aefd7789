# The entry of the paced guest: multiboot 1 hands over in 32-bit protected mode without paging.
# Our own segments, a stack, then main(command line).

.set MAGIC, 0x1BADB002
.set FLAGS, 0x00000003                  # modules on pages, memory map: what QEMU gives anyway

.section .multiboot, "a"
.align 4
.long MAGIC, FLAGS, -(MAGIC + FLAGS)

.section .text
.globl _start
_start:
    cli
    cld
    movl $stack_top, %esp
    movl 16(%ebx), %esi                 # multiboot_info.cmdline
    lgdt gdt_pointer
    ljmp $0x08, $1f
1:  movw $0x10, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %fs
    movw %ax, %gs
    movw %ax, %ss
    pushl %esi
    call main
2:  cli
    hlt
    jmp 2b

# The timer's interrupt only has to end the HLT. It returns without IRET, which KVM's emulator lacks in protected mode:
# the flags are put back, then a near return drops the code segment and the flags that the interrupt pushed.
.globl on_tick
on_tick:
    pushl %eax
    movb $0x20, %al
    outb %al, $0x20
    popl %eax
    pushl 8(%esp)
    popfl
    ret $8

.section .data
.align 8
gdt:
    .quad 0
    .quad 0x00CF9A000000FFFF            # code: flat, 32 bits
    .quad 0x00CF92000000FFFF            # data: flat
gdt_pointer:
    .word 23
    .long gdt

.section .bss
.align 16
    .skip 16384
stack_top:

.section .note.GNU-stack, "", @progbits
