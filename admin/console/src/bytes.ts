// Bytes: their hex form, and SHA-256 by WebCrypto.
export type Bytes = Uint8Array<ArrayBuffer>;

const encoder = new TextEncoder();

/** utf8 returns the bytes of a text. */
export const utf8 = (text: string): Bytes => encoder.encode(text);

/** hex returns lower-case digits. */
export const hex = (b: Uint8Array) => [...b].map((x) => x.toString(16).padStart(2, "0")).join("");

/** sha256 hashes parts, one after the other. */
export async function sha256(...parts: Uint8Array[]): Promise<Bytes> {
  const all = new Uint8Array(parts.reduce((n, p) => n + p.length, 0));
  let at = 0;
  for (const p of parts) { all.set(p, at); at += p.length; }
  return new Uint8Array(await crypto.subtle.digest("SHA-256", all));
}
