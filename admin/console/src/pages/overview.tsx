import { useEffect, useState } from "preact/hooks";
import { call, may, page } from "../api";
import type { AlertKind, Alerts, Health, Key } from "../generated";
import { health, ticks } from "../live";
import { link } from "../router";
import { myRoles } from "../session";
import { useStore } from "../store";
import { Dialog, Empty, Facts, Form, Id, Input, Load, Page, Section, Shape, Spark, State, Table, Text, Time, bytes, count, figure, plural, span, useLoad } from "../ui";
import type { Tone } from "../ui";
import { causeTone, custody, sentence } from "../words";

export function Overview() {
  const h = useStore(health), mine = myRoles();
  const keys = useLoad(async (signal) => (await page("GET /v1/keys", { query: { limit: 1000 }, signal })).items, [], ["rotation"]);
  const tpms = [...new Set((keys.data ?? []).filter((k) => k.custody.startsWith("tpm-")).map((k) => k.token))].sort();
  const [changed, setChanged] = useState(0);
  return <Page title="Overview" actions={h && <LockButtons h={h} />}>
    {h && <Headline h={h} changed={changed} />}
    {mine.includes("operator") && <FirstSteps />}
    {may(mine, "GET /v1/metrics") && <Now />}
    {may(mine, "GET /v1/tokens") && <Tokens h={h} keys={keys.data ?? []} />}
    {tpms.length > 0 && may(mine, "GET /v1/tokens/{name}") && <Measured h={h} tpms={tpms} changed={setChanged} />}
    {may(mine, "GET /v1/ledger") && <LedgerSheet />}
    {may(mine, "GET /v1/alerts") && <Watch h={h} />}
  </Page>;
}

/** Headline says the state. changed is the number of a TPM's registers that are not as sealed: the state learns of it at the next use of a seal. */
function Headline({ h, changed }: { h: Health; changed: number }) {
  const said = sentence(h);
  const told = changed && said.tone === "ok" ? { tone: "warn" as Tone, text: `This machine is in another state than its keys are sealed to: a key worker that starts anew can’t use them.` } : said;
  return <div class={"headline " + told.tone}>
    <p class="says"><State tone={told.tone}>{told.text}</State></p>
    {h.locked && h.since > 0 && <p class="quiet">Locked <Time s={h.since} ago />.</p>}
    {h.causes.map((c) => <div class="cause" key={c.code + c.subject + c.text}>
      <p><State tone={causeTone(c)}><a href={link("alerts", c.code)}><strong>{c.code}</strong></a>{c.subject && <> · <Text>{c.subject}</Text></>}</State></p>
      <p><Text>{c.text}</Text></p>
      <p class="quiet">What to do: <Text>{c.do}</Text></p>
    </div>)}
    {(h.alerts ?? []).filter((a) => !h.causes.some((c) => c.code === a.code)).map((a) => <div class="cause" key={a.code + (a.subject ?? "")}>
      <p><State tone={a.level === "critical" ? "crit" : "warn"}><a href={link("alerts", a.code)}><strong>{a.code}</strong></a>{a.subject && <> · <Text>{a.subject}</Text></>}</State> <span class="quiet">since <Time s={a.since} ago />{a.acknowledged ? <>, noted by <Text>{a.acknowledged.by}</Text></> : ""}</span></p>
      <p class="quiet">What to do: <Text>{a.do}</Text></p>
    </div>)}
  </div>;
}

function LockButtons({ h }: { h: Health }) {
  const [asking, setAsking] = useState(false);
  const [reason, setReason] = useState("");
  const mine = myRoles();
  return <>
    {h.locked && may(mine, "POST /v1/unlock") && <Form submit="Unlock" act={async () => { await call("POST /v1/unlock"); }} />}
    {!h.locked && may(mine, "POST /v1/lock") && <button type="button" onClick={() => setAsking(true)}>Lock…</button>}
    {asking && <Dialog title="Lock the appliance" close={() => setAsking(false)}>
      <Form submit="Lock" danger cancel={() => setAsking(false)} act={async () => { await call("POST /v1/lock", { body: { reason } }); setAsking(false); }}>
        <div class="loss"><State tone="warn">Nothing is signed or verified for any peer until an administrator unlocks it.</State></div>
        <Input label="Reason" value={reason} set={setReason} required maxLength={500} help="It goes into the audit log." />
      </Form>
    </Dialog>}
  </>;
}

/** FirstSteps leads from an empty appliance to the first signature, and is gone afterwards. */
function FirstSteps() {
  const all = useLoad(async (signal) => {
    const [tokens, keys, peers, signed] = await Promise.all([
      call("GET /v1/tokens", { signal }),
      page("GET /v1/keys", { query: { limit: 200 }, signal }), page("GET /v1/peers", { query: { limit: 1 }, signal }),
      page("GET /v1/events", { query: { type: "SignatureCreated", limit: 1 }, signal }),
    ]);
    return { tokens: tokens.length > 0 && tokens.every((t) => t.up), key: keys.items.some((k) => k.state === "active" && !k.own), peer: peers.items[0], signed: signed.items.length > 0 };
  }, [], ["rotation", "change", "proposal"]);
  const t = useStore(ticks);
  const d = all.data;
  const fresh = t.some((x) => (x.figures.signatures ?? 0) > 0);
  if (!d || d.signed || d.key && d.peer && fresh) return d && fresh && !d.signed
    ? <p class="notice ok" role="status"><State tone="ok">The first signature has arrived.</State></p> : null;
  const step = (done: boolean, title: string, what: preact.ComponentChildren) =>
    <li><Shape tone={done ? "ok" : "info"} /><div><strong>{title}</strong>{done ? <span class="quiet"> · done</span> : <div class="quiet">{what}</div>}</div></li>;
  return <Section title="First steps" note="Until the first signature has arrived.">
    <ol class="todo">
      {step(d.tokens, "Look at the token", <>It holds the keys, and does not serve: see Tokens below.</>)}
      {step(d.key, "Create a key", <>The device makes it, and it stays there. <a href="/keys">Keys</a></>)}
      {step(!!d.peer, "Enrol a peer", <>A payment server makes its identity and gives you the public half. <a href="/peers">Peers</a></>)}
      {step(false, "See its first signature", d.peer ? <>Copy the command of <a href={link("peers", d.peer.name)}>{d.peer.name}</a>, and run it on the payment server. This line changes by itself.</> : "The page of the peer has the command to copy.")}
    </ol>
  </Section>;
}

const shown: [name: string, label: string, unit: string][] = [
  ["signatures", "Signatures", "1/s"], ["verifications", "Verifications", "1/s"], ["refused", "Refused", "1/s"],
  ["sign_p99", "Signing, 99th percentile", "s"], ["connections", "Connections of peers", ""], ["waiting", "Callers waiting", ""],
];

function Now() {
  const t = useStore(ticks);
  const last = t[t.length - 1];
  return <Section title="Now" note={last ? <>Each second; the lines show the last {t.length === 1 ? "second" : plural(t.length, "second")}.</> : "The figures come with the next second."}>
    <Facts of={shown.map(([name, label, unit]) => [label, <span key={name}>{figure(last?.figures[name], unit)} <Spark label={label + ", last two minutes"} values={t.map((x) => x.figures[name] ?? null)} /></span>])} />
  </Section>;
}

function Tokens({ h, keys }: { h: Health | null; keys: Key[] }) {
  const sick = h?.causes.map((c) => c.code + c.subject).join();
  const tokens = useLoad((signal) => call("GET /v1/tokens", { signal }), [], ["change"]);
  const t = useStore(ticks);
  const last = t[t.length - 1]?.figures;
  const changed = [sick, last?.tokens_up, last?.workers_up, (last?.worker_restarts ?? 0) > 0].join();
  useEffect(() => tokens.reload(), [changed]);
  return <Section title="Tokens" note="The devices that hold the keys, and the processes that use them.">
    <Load of={tokens}>{(all) => <Table name="Tokens" rows={all} id={(x) => x.name} empty={<Empty title="No token is configured." />} columns={[
      { head: "Token", cell: (x) => <strong><Text>{x.name}</Text></strong> },
      { head: "State", cell: (x) => <State tone={x.up ? "ok" : "crit"}>{x.up ? "serves" : <>down{x.cause && <>: <Text>{x.cause}</Text></>}</>}</State> },
      { head: "Custody", cell: (x) => [...new Set(keys.filter((k) => k.token === x.name).map((k) => k.custody))].map((c) => <div key={c}>{custody[c]?.[0] ?? c} <span class="quiet">{custody[c]?.[1]}</span></div>) },
      { head: "Key workers", num: true, cell: (x) => `${x.workers.filter((w) => w.pid).length} of ${x.workers.length}` },
      { head: "Calls", num: true, quiet: true, cell: (x) => count(x.workers.reduce((n, w) => n + w.served, 0)) },
      { head: "Replaced", num: true, cell: (x) => count(x.workers.reduce((n, w) => n + w.restarts, 0)) },
    ]} />}</Load>
  </Section>;
}

/** Measured compares the registers of each TPM with the state that its keys were sealed to. */
function Measured({ h, tpms, changed }: { h: Health | null; tpms: string[]; changed: (registers: number) => void }) {
  const sick = h?.causes.map((c) => c.code + c.subject).join();
  const of = useLoad(async (signal) => {
    const all = await Promise.all(tpms.map((name) => call("GET /v1/tokens/{name}", { path: { name }, signal })));
    return all.flatMap((t) => t.findings.filter((f) => f.what === "measured" || !f.ok).map((f) => ({ ...f, token: t.name })));
  }, [sick, tpms.join()]);
  const bad = of.data?.filter((f) => !f.ok && f.what === "measured").length ?? 0;
  useEffect(() => changed(bad), [bad]);
  if (of.data && !of.data.length) return null;
  return <Section title="Measured state" note="What this machine has booted, against what the keys of a TPM are sealed to.">
    <Load of={of}>{(all) => <Table name="Measured state" rows={all} id={(f) => f.token + f.text} empty={null} columns={[
      { head: "Token", cell: (f) => <Text>{f.token}</Text> },
      { head: "State", cell: (f) => <State tone={f.ok ? "ok" : "crit"}>{f.ok ? "as sealed" : f.what === "measured" ? "another state" : f.what}</State> },
      { head: "Register", cell: (f) => <span class="break"><Text>{f.text}</Text></span> },
    ]} />}</Load>
  </Section>;
}

function LedgerSheet() {
  const mine = myRoles();
  const of = useLoad(async (signal) => {
    const [l, log, rollback] = await Promise.all([
      call("GET /v1/ledger", { signal }),
      may(mine, "GET /v1/log") ? call("GET /v1/log", { signal }) : undefined,
      may(mine, "GET /v1/rollback") ? call("GET /v1/rollback", { signal }) : undefined,
    ]);
    return { l, log, rollback };
  }, [], ["change", "proposal", "rotation", "alert"]);
  const t = useStore(ticks), h = useStore(health);
  const last = t[t.length - 1]?.figures;
  return <Section title="Ledger" note="Nonces, admissions and the audit log, in one file.">
    <Load of={of}>{({ l, log, rollback }) => <Facts of={[
      ["Events", count(l.events)],
      log && ["Epoch", String(log.epoch)],
      log && ["Audit log", <Id of="verifier key">{log.verifier_key}</Id>],
      ["Last checkpoint", <Time s={l.checkpoint} />],
      ["File", <>{bytes(l.file_size)} <span class="quiet">({bytes(l.free_bytes)} free in it)</span></>],
      last && last.disk_free !== undefined && ["Free on its disk", figure(last.disk_free, "bytes")],
      ["Live nonces", <>{count(h?.nonces?.alive ?? l.nonces)} <span class="quiet">of {count(l.max_nonces)}</span></>],
      ["Clock", l.behind_clock < -2 ? <State tone="crit">{span(-l.behind_clock)} behind the ledger</State> : l.behind_clock > 60 ? <State tone="warn">{span(l.behind_clock)} ahead of the ledger</State> : <State tone="ok">agrees with the ledger</State>],
      rollback && ["Rollback", rollback.detected ? <State tone="crit">detected: <Text>{rollback.reason ?? ""}</Text></State> : rollback.token ? <State tone="ok">guarded by a counter in {rollback.token}</State> : <State tone="off">nothing would detect an older ledger: no counter</State>],
      !!l.trouble && ["Trouble", <State tone="crit"><Text>{l.trouble ?? ""}</Text></State>],
    ]} />}</Load>
  </Section>;
}

/** Watch is the table of what is watched, with thresholds. */
function Watch({ h }: { h: Health | null }) {
  const firing = h?.alerts ?? [];
  const mine = myRoles();
  const all = useLoad((signal) => call("GET /v1/alerts", { signal }), [firing.map((a) => a.code + a.level).join()], ["alert"]);
  const past = useLoad(async (signal) => may(mine, "GET /v1/history")
    ? (await call("GET /v1/history", { query: { series: "refused,rate_limited,replays,handshakes_timeout", step: 60 }, signal })).series : [], []);
  return <Section title="What is watched" note={<>Each alert with its thresholds. <a href="/alerts">Alerts</a> has what to do.</>}>
    <Load of={all}>{(a: Alerts) => {
      const now = (k: AlertKind) => firing.filter((f) => f.code === k.code);
      const rows = a.kinds.filter((k) => k.measured || now(k).length);
      const rest = a.kinds.length - rows.length;
      return <>
        <Table name="What is watched" rows={rows} id={(k) => k.code} empty={null} columns={[
          { head: "Watched", name: true, cell: (k) => <><a href={link("alerts", k.code)}>{k.code}</a><br /><span class="quiet">{k.means}</span></> },
          { head: "State", cell: (k) => { const f = now(k)[0]; const tone: Tone = !f ? "ok" : f.level === "critical" ? "crit" : "warn"; return <State tone={tone}>{f ? f.level : "well"}{f?.acknowledged ? ", noted" : ""}</State>; } },
          { head: "Value", num: true, cell: (k) => k.measured ? figure(Math.round(k.measured.number * 10) / 10) + (k.measured.percent ? " %" : "") : "–" },
          { head: "Warning", num: true, cell: (k) => k.measured ? `> ${k.measured.warning}${k.measured.percent ? " %" : ""}` : k.fires },
          { head: "Critical", num: true, cell: (k) => k.measured ? `> ${k.measured.critical}${k.measured.percent ? " %" : ""}` : "" },
          { head: "Within", num: true, quiet: true, cell: (k) => k.measured ? span(k.measured.window) : "" },
          { head: "Two hours", quiet: true, cell: (k) => { const s = past.data?.find((x) => x.name === k.measured?.series); return s ? <Spark values={s.values} label={s.help} /> : null; } },
          { head: "Since", cell: (k) => { const f = now(k)[0]; return f ? <Time s={f.since} ago /> : <span class="quiet">–</span>; } },
        ]} />
        {rest > 0 && <p class="help">{plural(rest, "more kind")} of trouble {rest === 1 ? "is" : "are"} watched by causes of the state; none of them is here now.</p>}
      </>;
    }}</Load>
  </Section>;
}
