// A value that components follow.
import { useEffect, useState } from "preact/hooks";

export class Store<T> {
  private readers = new Set<(v: T) => void>();
  constructor(private value: T) {}
  get(): T { return this.value; }
  set(v: T) {
    this.value = v;
    for (const each of [...this.readers]) each(v);
  }
  follow(reader: (v: T) => void): () => void {
    this.readers.add(reader);
    return () => void this.readers.delete(reader);
  }
}

export function useStore<T>(s: Store<T>): T {
  const [, turn] = useState({});
  const shown = s.get();
  useEffect(() => {
    const end = s.follow(() => turn({}));
    if (s.get() !== shown) turn({}); // it has changed between the rendering and this effect
    return end;
  }, [s]);
  return shown;
}
