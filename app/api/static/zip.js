// Writes files into one zip, uncompressed, since pictures are compressed already (APPNOTE 6.3, 4.3).

const TABLE = Uint32Array.from({ length: 256 }, (_, byte) => {
  let rest = byte;
  for (let bit = 0; bit < 8; bit += 1) rest = rest & 1 ? 0xedb88320 ^ (rest >>> 1) : rest >>> 1;
  return rest;
});
const MOST = 0xffff; // entries, and four gigabytes: more would need the 64-bit form
export const MOST_BYTES = 0xf0000000;

/** `files` are {name, blob, date}; names that are the same get a number. */
export async function zipped(files) {
  const pieces = [];
  const directory = [];
  const names = new Set();
  let offset = 0;
  for (const { name, blob, date } of files.slice(0, MOST)) {
    const bytes = new TextEncoder().encode(unused(name, names));
    const crc = checksum(new Uint8Array(await blob.arrayBuffer()));
    const about = [0x14, 0x0800, 0, ...dosTime(date), [crc], [blob.size], [blob.size], bytes.length, 0];
    pieces.push(packed([0x04034b50], ...about), bytes, blob);
    directory.push(packed([0x02014b50], 0x14, ...about, 0, 0, 0, [0], [offset]), bytes);
    offset += 30 + bytes.length + blob.size;
  }
  const size = directory.reduce((sum, piece) => sum + piece.length, 0);
  const count = directory.length / 2;
  const end = packed([0x06054b50], 0, 0, count, count, [size], [offset], 0);
  return new Blob([...pieces, ...directory, end], { type: "application/zip" });
}

/** A name for a file, from what was asked for. */
export function pictureName(wish, ending) {
  const words = wish.prompt.normalize("NFC").replaceAll(/[^\p{L}\p{N}]+/gu, "-").replaceAll(/^-+|-+$/g, "");
  return `${[...words].slice(0, 60).join("") || "picture"}-${wish.seed}.${ending}`;
}

function unused(name, names) {
  let found = name;
  for (let number = 2; names.has(found); number += 1) found = name.replace(/(\.\w+)$/, `-${number}$1`);
  names.add(found);
  return found;
}

function checksum(bytes) {
  let rest = -1;
  for (const byte of bytes) rest = TABLE[(rest ^ byte) & 0xff] ^ (rest >>> 8);
  return (rest ^ -1) >>> 0;
}

function dosTime(date) {
  const it = new Date(date);
  const time = (it.getHours() << 11) | (it.getMinutes() << 5) | (it.getSeconds() >> 1);
  return [time, ((it.getFullYear() - 1980) << 9) | ((it.getMonth() + 1) << 5) | it.getDate()];
}

/** Little-endian numbers: of two bytes, and in brackets of four. */
function packed(...numbers) {
  const bytes = numbers.flatMap((number) => {
    const [value, count] = Array.isArray(number) ? [number[0], 4] : [number, 2];
    return Array.from({ length: count }, (_, at) => (value >>> (8 * at)) & 0xff);
  });
  return Uint8Array.from(bytes);
}
