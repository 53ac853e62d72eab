// How glibc's malloc takes memory from the kernel.
#pragma once

// Of a program that has just been captured: in large steps, where nothing limits it.
void heap_begin(void);

// From now on this process has it, if it is that of a program that was begun; a forked child.
void heap_mine(void);
