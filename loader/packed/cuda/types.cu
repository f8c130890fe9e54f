// Types and constants of all kernels. Put before each source.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

#define EVERY 0xFFFFFFFFu
