/* A guest without an operating system that writes memory at a known pace: the known answer that everything is held to.
 *
 * In: the multiboot command line, `pattern=idle|uniform|sequential|hot|phased pages= writes= hot_pages= hot_share= base=
 * phase_ms= seed= computing=0|1`. Out: "ready" on the debug console (port 0xe9) once every data page is non-zero; then `writes` page
 * writes per millisecond of the time-stamp counter. Between its milliseconds it halts, so that it does not burn a core.
 *
 *   uniform     each write to a random page of the `pages`
 *   sequential  each write to the next page, round and round
 *   hot         with a probability of `hot_share` percent to one of the first `hot_pages`, else as uniform
 *   phased      as uniform for phase_ms, then nothing for phase_ms, and so on
 *   idle        no writes
 *
 * A computing guest never halts, and what it did not do while its CPU was taken away it does not do later: its pace is that of its CPU.
 *
 * The page before the data tells how it fared: struct pulse, read, and set back to 0, from outside. Only a new longest pause is written.
 */
#include <stdint.h>

#define PAGE 4096u
#define PIT_HZ 1193182u
#define FILLED 64u     /* bytes of a page that are made non-zero */
#define APIC(at) (*(volatile uint32_t *)(0xfee00000u + (at)))
#define BACKLOG_MS 50u /* after a stop: no more than this is made up for */

enum pattern { IDLE, UNIFORM, SEQUENTIAL, HOT, PHASED };

struct pulse { uint32_t per_ms, reserved; volatile uint64_t longest; }; /* counts of the time-stamp counter between two turns of work */
struct gate { uint16_t low, selector, flags, high; } __attribute__((packed));
struct table { uint16_t limit; uint32_t base; } __attribute__((packed));

extern void on_tick(void);
static struct gate gates[48] __attribute__((aligned(8)));

static inline void outb(uint16_t port, uint8_t value) { __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port)); }
static inline uint8_t inb(uint16_t port) { uint8_t value; __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port)); return value; }
static inline uint64_t rdtsc(void) { uint64_t value; __asm__ volatile("rdtsc" : "=A"(value)); return value; }

static void say(const char *text) { while (*text) outb(0xe9, (uint8_t)*text++); }
static void say_number(uint32_t value)
{
    char digits[11];
    int i = 10;
    digits[10] = 0;
    do digits[--i] = (char)('0' + value % 10); while ((value /= 10) && i);
    say(digits + i);
}

/* The value of ` key=`, or null. */
static const char *find(const char *line, const char *key)
{
    for (; *line; line++) {
        if (*line != ' ') continue;
        const char *at = line + 1, *k = key;
        while (*k && *at == *k) at++, k++;
        if (!*k && *at == '=') return at + 1;
    }
    return 0;
}

static uint32_t number(const char *line, const char *key, uint32_t otherwise)
{
    const char *at = find(line, key);
    uint32_t value = 0;
    if (!at) return otherwise;
    for (; *at >= '0' && *at <= '9'; at++) value = value * 10 + (uint32_t)(*at - '0');
    return value;
}

static enum pattern pattern_of(const char *line)
{
    const char *at = find(line, "pattern");
    switch (at ? *at : 'i') {
    case 'u': return UNIFORM;
    case 's': return SEQUENTIAL;
    case 'h': return HOT;
    case 'p': return PHASED;
    default: return IDLE;
    }
}

/* Counts of the time-stamp counter in a millisecond, by 20 ms of the PIT's channel 2; a delay can only add, so the least of
 * four is the best. */
static uint32_t calibrate(void)
{
    uint32_t count = PIT_HZ / 50, least = 0xffffffffu;
    for (int i = 0; i < 4; i++) {
        outb(0x61, (inb(0x61) & ~2) | 1); /* gate on, speaker off */
        outb(0x43, 0xb0);                 /* channel 2, both bytes, mode 0: the output rises at the end */
        outb(0x42, (uint8_t)count);
        outb(0x42, (uint8_t)(count >> 8));
        uint64_t began = rdtsc();
        while (!(inb(0x61) & 0x20)) { }
        uint32_t counts = (uint32_t)(rdtsc() - began) / 20;
        if (counts < least) least = counts;
    }
    return least;
}

/* Interrupt 0x20 at 1 kHz from the PIT's channel 0, everything else masked. */
static void start_timer(void)
{
    uint32_t handler = (uint32_t)on_tick, count = PIT_HZ / 1000;
    for (int i = 0x20; i < 0x30; i++)
        gates[i] = (struct gate){ (uint16_t)handler, 0x08, 0x8e00, (uint16_t)(handler >> 16) };
    struct table idt = { sizeof gates - 1, (uint32_t)gates };
    __asm__ volatile("lidt %0" : : "m"(idt));
    APIC(0xf0) = 0x1ff; /* on; a firmware that knows only virtio leaves it off */
    APIC(0x350) = 0x700; /* LINT0: what the PIC says */
    outb(0x20, 0x11); outb(0x21, 0x20); outb(0x21, 0x04); outb(0x21, 0x01);
    outb(0xa0, 0x11); outb(0xa1, 0x28); outb(0xa1, 0x02); outb(0xa1, 0x01);
    outb(0x21, 0xfe);
    outb(0xa1, 0xff);
    outb(0x43, 0x34); /* channel 0, both bytes, mode 2 */
    outb(0x40, (uint8_t)count);
    outb(0x40, (uint8_t)(count >> 8));
}

/* The writing loops are assembly, few instructions each: where KVM itself runs under a hypervisor it may emulate every
 * instruction of a guest without paging, at a microsecond or two apiece. Each write increments one byte: never the same
 * content, never across a page.
 *
 * A multiplicative generator modulo 2^32 (L'Ecuyer 1999), of which the upper bits choose the byte: state * bytes / 2^32. */
static uint32_t state;
static inline void write_random(uint8_t *data, uint32_t pages, uint32_t writes)
{
    if (!writes) return;
    __asm__ volatile("1: imull $747796405, %[state], %[state]\n"
                     "   movl %[state], %%eax\n"
                     "   mull %[bytes]\n"
                     "   incb (%[data],%%edx)\n"
                     "   loop 1b"
                     : [state] "+r"(state), "+c"(writes)
                     : [bytes] "r"(pages * PAGE), [data] "r"(data)
                     : "eax", "edx", "cc", "memory");
}

static inline void write_run(uint8_t *from, uint32_t writes)
{
    if (!writes) return;
    __asm__ volatile("1: incb (%[from])\n"
                     "   addl $4096, %[from]\n"
                     "   loop 1b"
                     : [from] "+r"(from), "+c"(writes) : : "cc", "memory");
}

void main(const char *line)
{
    enum pattern pattern = pattern_of(line);
    uint32_t pages = number(line, "pages", 0), writes = number(line, "writes", 0), base = number(line, "base", 8192);
    uint32_t hot_pages = number(line, "hot_pages", 0), hot_share = number(line, "hot_share", 0);
    uint32_t phase_ms = number(line, "phase_ms", 1000), computing = number(line, "computing", 0);
    uint8_t *data = (uint8_t *)(base * PAGE);
    uint32_t next = 0, in_phase = 0, writing = 1, owed = 0;

    state = number(line, "seed", 1) * 2654435761u | 1;
    for (uint32_t i = 0; i < pages; i++) {
        uint32_t *words = (uint32_t *)(data + i * PAGE), count = FILLED / 4;
        __asm__ volatile("rep stosl" : "+D"(words), "+c"(count) : "a"(0x01010101u) : "memory");
    }
    uint32_t per_ms = calibrate();
    start_timer();
    say("tsc_per_ms ");
    say_number(per_ms);
    say("\nready\n");
    if (!pages || !writes) pattern = IDLE;
    if (pattern == IDLE) for (;;) __asm__ volatile("cli; hlt");

    struct pulse *pulse = (struct pulse *)(data - PAGE);
    pulse->per_ms = per_ms;
    uint64_t due = rdtsc(), worked = due, seen = due;
    for (;;) {
        uint64_t now = rdtsc();
        uint64_t most = (uint64_t)per_ms * BACKLOG_MS;
        /* It never halts, so where it does not see the clock for a millisecond, its CPU was taken away. */
        if (computing && now - seen > per_ms) due += now - seen;
        seen = now;
        /* A clock that went backwards (another host) starts anew, too. */
        if (now + most < due || now > due + most) due = now;
        while ((int64_t)(now - due) >= (int64_t)per_ms) {
            due += per_ms;
            if (pattern == PHASED && ++in_phase >= phase_ms) in_phase = 0, writing = !writing;
            if (pattern == SEQUENTIAL) {
                for (uint32_t left = writes; left;) {
                    uint32_t run = left < pages - next ? left : pages - next;
                    write_run(data + next * PAGE, run);
                    left -= run;
                    next += run;
                    if (next == pages) next = 0;
                }
            } else if (pattern == HOT) {
                /* The share is kept exactly over 100 writes, the rest carried on: less noise than drawing lots. */
                uint32_t hot = 0;
                for (owed += writes * hot_share; owed >= 100; owed -= 100) hot++;
                write_random(data, hot_pages, hot);
                write_random(data, pages, writes - hot);
            } else if (writing) {
                write_random(data, pages, writes);
            }
            uint64_t done = rdtsc();
            if (done - worked > pulse->longest) pulse->longest = done - worked;
            worked = done;
        }
        if (!computing) __asm__ volatile("sti; hlt; cli");
    }
}
