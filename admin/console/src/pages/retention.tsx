import { useState } from "preact/hooks";
import { ActDialog } from "../act";
import { call, may, mayPropose, page } from "../api";
import type { Epoch, Hold, Receipt } from "../generated";
import { link, route, setQuery } from "../router";
import { myRoles } from "../session";
import { useStore } from "../store";
import { Dialog, Empty, Field, Form, Id, Input, Load, Page, Section, State, Table, Text, Time, count, useList, useLoad } from "../ui";

export function Retention({ receipts }: { receipts?: boolean }) {
  return receipts ? <Receipts /> : <Epochs />;
}

function Epochs() {
  const mine = myRoles();
  const of = useLoad((signal) => call("GET /v1/retention", { signal }), [], ["change"]);
  const [holding, setHolding] = useState<Epoch | null>(null);
  const [releasing, setReleasing] = useState<{ e: Epoch; h: Hold } | null>(null);
  return <Page title="Retention" lead="What has gone by the schedule, what will go and when, and what a legal hold keeps.">
    <Load of={of}>{(r) => <>
      <Section title="Epochs of the log" note="An epoch goes as a whole, after its time.">
        <Table name="Epochs" rows={[...r.epochs].reverse()} id={(e) => e.epoch} empty={<Empty title="There is no epoch." />} columns={[
          { head: "Epoch", cell: (e) => String(e.epoch) },
          { head: "Events", num: true, cell: (e) => <>{count(e.size)} <span class="quiet">from {e.first}</span></> },
          { head: "Begun", cell: (e) => <Time s={e.begun} /> },
          { head: "State", cell: (e) => e.dropped ? <State tone="off">dropped <Time s={e.dropped} /></State> : e.holds.length ? <State tone="info">held</State> : !e.ended ? <State tone="ok">present</State> : e.due * 1000 < Date.now() && e.due ? <State tone="warn">goes at the next run</State> : <State tone="ok">kept</State> },
          { head: "May go", cell: (e) => e.dropped ? "" : <Time s={e.due} ago none="not before it ends" /> },
          { head: "Legal holds", cell: (e) => <>{e.holds.map((h) => <div key={h.name}><Text>{h.name}</Text> <span class="quiet"><Text>{h.reason}</Text></span>{mayPropose(mine, "hold release") && <> <button type="button" class="link" onClick={() => setReleasing({ e, h })}>Release…</button></>}</div>)}
            {!e.dropped && may(mine, "POST /v1/log/epochs/{epoch}/holds") && <button type="button" onClick={() => setHolding(e)}>Hold…</button>}</> },
        ]} />
      </Section>
      <Section title="Receipts"><p>Receipts from before <Time s={r.receipts_before} /> are dropped. {may(mine, "GET /v1/receipts") && <a href="/receipts">Receipts by time</a>}</p></Section>
    </>}</Load>
    {holding && <NewHold e={holding} close={() => setHolding(null)} done={of.reload} />}
    {releasing && <Release {...releasing} close={() => setReleasing(null)} done={of.reload} />}
  </Page>;
}

function NewHold({ e, close, done }: { e: Epoch; close: () => void; done: () => void }) {
  const [name, setName] = useState("");
  const [reason, setReason] = useState("");
  return <Dialog title={`Hold epoch ${e.epoch}`} close={close}>
    <Form submit="Hold" cancel={close} act={async () => { await call("POST /v1/log/epochs/{epoch}/holds", { path: { epoch: e.epoch }, body: { name, reason } }); done(); close(); }}>
      <p>The epoch is kept, whatever its time says, until the hold is released under approval.</p>
      <Input label="Name" value={name} set={setName} required maxLength={64} help="For example case-4711." />
      <Input label="Reason" value={reason} set={setReason} required maxLength={500} help="It goes into the audit log." />
    </Form>
  </Dialog>;
}

function Release({ e, h, close, done }: { e: Epoch; h: Hold; close: () => void; done: () => void }) {
  const [reason, setReason] = useState("");
  return <ActDialog title={`Release the hold ${h.name}`} loss={`Epoch ${e.epoch} with ${count(e.size)} events may go as soon as its time is over.`} name={h.name} close={close} done={done} can={!!reason}
    make={() => ({ act: "hold release", parameters: { epoch: String(e.epoch), name: h.name, reason } })}>
    <Input label="Reason" value={reason} set={setReason} required maxLength={500} />
  </ActDialog>;
}

function Receipts() {
  const { query } = useStore(route);
  const id = query.get("id") ?? "", from = query.get("from") ?? "", to = query.get("to") ?? "";
  const ms = (x: string) => x ? new Date(x).getTime() : undefined;
  const list = useList(async (after, signal) => id
    ? { items: [await call("GET /v1/receipts/{id}", { path: { id }, signal })], next: "" }
    : page("GET /v1/receipts", { query: { from: ms(from), to: ms(to), after, limit: 50 }, signal }), [id, from, to]);
  const [v, setV] = useState(id);
  return <Page title="Receipts" lead="The minimal record of each signed payment: kept for years, without personal data.">
    <Section title="Search">
      <form class="row" role="search" onSubmit={(e) => { e.preventDefault(); setQuery({ id: v.trim() }); }}>
        <Input label="Receipt id" value={v} set={setV} />
        <Field label="From">{(i) => <input id={i} type="datetime-local" value={from} onChange={(e) => setQuery({ from: e.currentTarget.value, id: "" })} />}</Field>
        <Field label="Until">{(i) => <input id={i} type="datetime-local" value={to} onChange={(e) => setQuery({ to: e.currentTarget.value, id: "" })} />}</Field>
        <button class="primary">Search</button>
      </form>
    </Section>
    <Section title="Receipts" note="By time.">
      <Load of={list}>{() => <Table name="Receipts" rows={list.items} id={(r: Receipt) => r.id} more={list.more} loading={list.loadingMore}
        empty={<Empty title="No receipt fits.">Each signature of a document with a payment makes one.</Empty>} columns={[
          { head: "Receipt", cell: (r) => <Id of="receipt id">{r.id}</Id> },
          { head: "When", cell: (r) => <Time ms={r.time_ms} /> },
          { head: "Method", cell: (r) => <Text>{r.method}</Text> },
          { head: "Status", cell: (r) => <Text>{r.status}</Text> },
          { head: "Commitment", quiet: true, cell: (r) => <Id of="commitment">{r.commitment}</Id> },
          { head: "Event", num: true, cell: (r) => may(myRoles(), "GET /v1/events") ? <a href={link("audit", r.event)}>{r.event}</a> : r.event },
        ]} />}</Load>
    </Section>
  </Page>;
}
