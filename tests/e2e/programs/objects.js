// Objects, maps, strings and typed arrays, with garbage in between; prints one digest. Argument: thousands of entries.
const { createHash } = require("crypto");
const count = Number(process.argv[2]) * 1000;
let map = new Map(), list = [];
for (let i = 0; i < count; i++) {
    map.set((i * 7919) % 1000003, { id: i, name: "n" + i, tags: [i % 3, i % 5] });
    if (i % 4 === 0) list.push(new Float64Array(8).fill(i));
}
for (let i = 0; i < count; i += 3) map.get((i * 7919) % 1000003).name += "!" + i;
const digest = createHash("sha256");
for (const key of [...map.keys()].sort((a, b) => a - b)) {
    const o = map.get(key);
    digest.update(`${key} ${o.id} ${o.name} ${o.tags}`);
}
digest.update(String(list.reduce((sum, a) => sum + a[7], 0)));
console.log(map.size, digest.digest("hex"));
