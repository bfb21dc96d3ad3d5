import { useEffect, useState } from "preact/hooks";
import { call, may, page } from "../api";
import type { Alert, AlertKind } from "../generated";
import { health } from "../live";
import { myRoles } from "../session";
import { useStore } from "../store";
import type { Part } from "../help";
import { link } from "../router";
import { Dialog, Empty, Facts, Form, Input, Load, Page, Section, Select, State, Table, Text, Time, useList, useLoad } from "../ui";
import type { Tone } from "../ui";

const tone = (a: Alert): Tone => a.level === "critical" ? "crit" : "warn";

export function Alerts() {
  const h = useStore(health), mine = myRoles();
  const [noting, setNoting] = useState<Alert | null>(null);
  const [testing, setTesting] = useState(false);
  const firing = h?.alerts?.map((a) => a.code + (a.subject ?? "") + a.level + (a.acknowledged?.until ?? "")).join() ?? "";
  const all = useLoad((signal) => call("GET /v1/alerts", { signal }), [firing], ["alert"]);
  return <Page title="Alerts" lead="What fires now, what to do about it, and what has fired before."
    actions={may(mine, "POST /v1/alerts/test") && <button type="button" onClick={() => setTesting(true)}>Send a test message…</button>}>
    <Section title="Firing" note="The gravest first.">
      <Load of={all}>{({ firing }) => <Table name="Firing alerts" rows={firing} id={(a) => a.code + (a.subject ?? "")}
        empty={<Empty title="No alert fires.">Alerts come here by themselves, and go when their reason is over. The kinds are listed below.</Empty>} columns={[
          { head: "Alert", name: true, cell: (a) => <><State tone={tone(a)}><a href={link("alerts", a.code)}><strong>{a.code}</strong></a></State>{a.subject && <> · <Text>{a.subject}</Text></>}<br /><Text>{a.text}</Text></> },
          { head: "What to do", cell: (a) => <><Text>{a.do}</Text><br /><span class="quiet">{a.see}</span></> },
          { head: "Since", cell: (a) => <Time s={a.since} ago /> },
          { head: "Noted", cell: (a) => a.acknowledged ? <><Text>{a.acknowledged.by}</Text>{a.acknowledged.reason && <>: <Text>{a.acknowledged.reason}</Text></>}<br /><span class="quiet">until <Time s={a.acknowledged.until} /></span></>
            : may(mine, "POST /v1/alerts/acknowledge") ? <button type="button" onClick={() => setNoting(a)}>Take note…</button> : <span class="quiet">nobody yet</span> },
        ]} />}</Load>
    </Section>
    {may(mine, "GET /v1/events") && <Past />}
    <Section title="All kinds" note="When each fires, by the configuration.">
      <Load of={all}>{({ kinds }) => <Table name="Kinds of alerts" rows={kinds} id={(k: AlertKind) => k.code} empty={null} columns={[
        { head: "Code", name: true, cell: (k) => <a href={link("alerts", k.code)}>{k.code}</a> },
        { head: "Means", cell: (k) => k.means },
        { head: "Fires", cell: (k) => k.fires },
        { head: "What to do", quiet: true, cell: (k) => <Text>{k.do}</Text> },
      ]} />}</Load>
    </Section>
    {noting && <Note alert={noting} close={() => setNoting(null)} done={all.reload} />}
    {testing && <Test close={() => setTesting(false)} />}
  </Page>;
}

/** Kind is the page of one kind of alert: what docs/OPERATIONS.md says of it, and whether it fires. */
export function Kind({ code }: { code: string }) {
  const h = useStore(health);
  const firing = (h?.alerts ?? []).filter((a) => a.code === code);
  const all = useLoad((signal) => call("GET /v1/alerts", { signal }), [firing.length], ["alert"]);
  const [paragraphs, setParagraphs] = useState<Part[][]>();
  useEffect(() => { void import("../help").then((m) => setParagraphs(m.help[code] ?? [])); }, [code]);
  return <Page title={<Text>{code}</Text>} back={{ to: "/alerts", name: "Alerts" }}>
    <Load of={all}>{({ kinds }) => {
      const k = kinds.find((x) => x.code === code);
      if (!k) return <Empty title="There is no alert with this code." />;
      return <>
        <Section title="What it is">
          <Facts of={[
            ["Means", k.means], ["Fires", k.fires],
            ["Now", firing.length ? firing.map((a) => <div key={a.subject ?? ""}><State tone={tone(a)}>{a.level}</State> {a.subject && <Text>{a.subject}</Text>} <Text>{a.text}</Text> <span class="quiet">since <Time s={a.since} ago /></span></div>)
              : <State tone="ok">does not fire</State>],
          ]} />
        </Section>
        <Section title="What to do" note="As in docs/OPERATIONS.md.">
          <p><strong><Text>{k.do}</Text></strong></p>
          {paragraphs?.map((p, i) => <p key={i}>{p.map((x) => typeof x === "string" ? x : "code" in x ? <code>{x.code}</code> : <>“{x.title}” ({x.of})</>)}</p>)}
        </Section>
      </>;
    }}</Load>
    {may(myRoles(), "GET /v1/events") && <Past code={code} />}
  </Page>;
}

/** Past shows the alerts of the audit log: all, or those with a code. */
function Past({ code }: { code?: string }) {
  const query = (type: string, after: string) => ({ type, order: "newest" as const, limit: 20, after, ...(code ? { resource: "alert/" + code } : {}) });
  const past = useList((after, signal) => page("GET /v1/events", { query: query("AlertFiring", after), signal }), [code], ["alert"]);
  const ends = useList((after, signal) => page("GET /v1/events", { query: query("AlertResolved", after), signal }), [code], ["alert"]);
  const rows = [...past.items, ...ends.items].sort((x, y) => y.index - x.index);
  return <Section title="History" note="From the audit log, the newest first.">
    <Load of={past}>{() => <Table name="Past alerts" rows={rows} id={(e) => e.index} more={past.more ?? ends.more} loading={past.loadingMore || ends.loadingMore}
      empty={<Empty title={code ? "This alert has never fired." : "No alert has ever fired."}>Each begin and each end of an alert is an event of the audit log.</Empty>} columns={[
        { head: "When", cell: (e) => <Time ms={e.time_ms} /> },
        { head: "Alert", cell: (e) => <a href={"/audit/" + e.index}><Text>{e.resource ?? e.metadata?.code ?? ""}</Text></a> },
        { head: "What", cell: (e) => <State tone={e.type === "AlertResolved" ? "ok" : e.metadata?.level === "critical" ? "crit" : "warn"}>{e.type === "AlertResolved" ? "ended" : e.metadata?.level ?? "fired"}</State> },
        { head: "Details", cell: (e) => <Text>{e.metadata?.text ?? e.metadata?.reason ?? ""}</Text> },
      ]} />}</Load>
  </Section>;
}

function Note({ alert, close, done }: { alert: Alert; close: () => void; done: () => void }) {
  const [seconds, setSeconds] = useState("86400");
  const [reason, setReason] = useState("");
  return <Dialog title={`Take note of ${alert.code}`} close={close}>
    <Form submit="Take note" cancel={close} act={async () => {
      await call("POST /v1/alerts/acknowledge", { body: { code: alert.code, ...(alert.subject ? { subject: alert.subject } : {}), seconds: Number(seconds), reason } });
      done();
      close();
    }}>
      <p><Text>{alert.text}</Text></p>
      <Select label="It is not sent again for" value={seconds} set={setSeconds} options={[["3600", "an hour"], ["14400", "four hours"], ["86400", "a day"], ["604800", "a week"]]} />
      <Input label="Reason" value={reason} set={setReason} maxLength={500} help="It goes into the audit log. A graver level is sent all the same." />
    </Form>
  </Dialog>;
}

function Test({ close }: { close: () => void }) {
  const sent = useLoad((signal) => call("POST /v1/alerts/test", { signal }), []);
  return <Dialog title="A test message to each receiver" close={close}>
    <Load of={sent} what="Sending">{(all) => <Table name="Receivers" rows={all} id={(t) => t.receiver}
      empty={<Empty title="There is no receiver.">Receivers are in the configuration: <code>[[webhooks]]</code> and <code>[mail]</code>.</Empty>} columns={[
        { head: "Receiver", cell: (t) => <Text>{t.receiver}</Text> },
        { head: "Answer", cell: (t) => t.error ? <State tone="crit"><Text>{t.error}</Text></State> : <State tone="ok"><Text>{t.answer || "taken"}</Text></State> },
      ]} />}</Load>
    <div class="buttons"><button type="button" onClick={close}>Close</button></div>
  </Dialog>;
}
