// Addresses of pages. Each page and each filter has an address that can be sent to a colleague.
import { Store } from "./store";

export type Address = { path: string[]; query: URLSearchParams };

const read = (): Address => ({
  path: location.pathname.split("/").filter(Boolean).map((p) => {
    try { return decodeURIComponent(p); } catch { return p; }
  }),
  query: new URLSearchParams(location.search),
});

export const route = new Store<Address>(read());

export function go(to: string, replace = false) {
  if (replace) history.replaceState(null, "", to);
  else history.pushState(null, "", to);
  route.set(read());
  if (!replace) scrollTo(0, 0);
}

/** setQuery changes parameters of the present address; "" removes one. */
export function setQuery(change: Record<string, string>) {
  const q = new URLSearchParams(location.search);
  for (const [name, value] of Object.entries(change)) {
    if (value) q.set(name, value);
    else q.delete(name);
  }
  const text = q.toString();
  go(location.pathname + (text ? "?" + text : ""), true);
}

export function link(...path: (string | number)[]): string {
  return "/" + path.map((p) => encodeURIComponent(String(p))).join("/");
}

export function begin() {
  addEventListener("popstate", () => route.set(read()));
  document.addEventListener("click", (e) => {
    const a = (e.target as Element).closest?.("a");
    if (!a || e.defaultPrevented || e.button !== 0 || e.metaKey || e.ctrlKey || e.shiftKey || a.target || a.hasAttribute("download")) return;
    const to = new URL(a.href);
    if (to.origin !== location.origin || to.pathname.startsWith("/v1/") || a.getAttribute("href")!.startsWith("#")) return;
    e.preventDefault();
    go(to.pathname + to.search);
  });
}
