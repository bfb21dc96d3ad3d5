// Search by "/": pages, keys, peers, and what a number or a digest can be.
import { useEffect, useId, useState } from "preact/hooks";
import { may, page } from "./api";
import { go, link } from "./router";
import { myRoles } from "./session";
import { Dialog } from "./ui";

type Found = { name: string; kind: string; to: string };

export function Search({ pages, close }: { pages: { name: string; to: string }[]; close: () => void }) {
  const [text, setText] = useState("");
  const [found, setFound] = useState<Found[]>([]);
  const [at, setAt] = useState(0);
  const id = useId();
  useEffect(() => {
    const q = text.trim(), mine = myRoles(), stop = new AbortController();
    const here: Found[] = pages.filter((p) => p.name.toLowerCase().includes(q.toLowerCase())).map((p) => ({ ...p, kind: "page" }));
    if (/^\d+$/.test(q)) {
      if (may(mine, "GET /v1/events")) here.unshift({ name: `Event ${q}`, kind: "audit log", to: link("audit", q) });
      if (may(mine, "GET /v1/proposals/{id}")) here.unshift({ name: `Proposal ${q}`, kind: "approvals", to: link("approvals", q) });
    } else if (/^[0-9a-f]{64}$/.test(q) && may(mine, "GET /v1/events")) {
      here.unshift({ name: "Events with this nonce", kind: "audit log", to: "/audit?nonce=" + q }, { name: "Events with this digest", kind: "audit log", to: "/audit?digest=" + q });
    }
    setFound(here);
    setAt(0);
    if (q) {
      const query = { find: q, limit: 6 };
      void Promise.all([
        page("GET /v1/keys", { query, signal: stop.signal }).then((p) => [...new Set(p.items.map((k) => k.name))].map((name) => ({ name, kind: "key", to: link("keys", name) }))),
        page("GET /v1/peers", { query, signal: stop.signal }).then((p) => p.items.map((x) => ({ name: x.name, kind: "peer", to: link("peers", x.name) }))),
      ]).then((all) => { if (!stop.signal.aborted) setFound([...all.flat(), ...here]); }, () => { /* the pages are found all the same */ });
    }
    return () => stop.abort();
  }, [text]);
  const take = (f: Found | undefined) => { if (f) { close(); go(f.to); } };
  return <Dialog title="Search" close={close}>
    <div class="find">
      <input role="combobox" aria-label="Search for a page, key, peer, event or proposal" aria-expanded="true" aria-controls={id} aria-autocomplete="list"
        aria-activedescendant={found[at] ? `${id}-${at}` : undefined} placeholder="A page, key, peer, number or digest" autocomplete="off" spellcheck={false}
        value={text} autofocus onInput={(e) => setText(e.currentTarget.value)} onKeyDown={(e) => {
          if (e.key === "ArrowDown") setAt(Math.min(at + 1, found.length - 1));
          else if (e.key === "ArrowUp") setAt(Math.max(at - 1, 0));
          else if (e.key === "Enter") take(found[at]);
          else return;
          e.preventDefault();
        }} />
      <ul role="listbox" id={id} aria-label="Found">{found.map((f, i) =>
        <li role="option" id={`${id}-${i}`} aria-selected={i === at} key={f.to} onMouseDown={(e) => e.preventDefault()} onClick={() => take(f)} onMouseMove={() => setAt(i)}>
          <span>{f.name}</span><span class="quiet">{f.kind}</span>
        </li>)}</ul>
      {!found.length && <p class="quiet" role="status">Nothing has this name.</p>}
    </div>
  </Dialog>;
}
