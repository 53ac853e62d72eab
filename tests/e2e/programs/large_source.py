"""Writes C source that a compiler needs some memory for. Arguments: how many functions."""

import sys

print("#include <stdint.h>\nstatic uint64_t table[4096];")
count = int(sys.argv[1])
for i in range(count):
    print(f"""struct s{i} {{ int x[{i % 7 + 1}]; long y; }};
uint64_t f{i}(uint64_t a, const char *s, struct s{i} *p) {{
    uint64_t sum = a * {i * 7919 % 65521}u;
    for (int k = 0; s[k]; k++) {{
        sum = (sum << {i % 13 + 1}) ^ (uint64_t)s[k] ^ table[(sum + {i}) % 4096];
        if (sum % {i % 11 + 2} == 0) table[(sum >> 7) % 4096] += p->y + p->x[k % {i % 7 + 1}];
        else switch (sum % 5) {{ case 0: sum += {i}; break; case 1: sum ^= a; break; default: sum *= 3; }}
    }}
    return sum{f" + f{i - 1}(sum, s + 1, (void *)p)" if i else ""};
}}""")
