// What the words of the API mean, for a person.
import type { Cause, Health, Key } from "./generated";
import type { Tone } from "./ui";

export const custody: Record<string, [name: string, means: string]> = {
  "hsm-resident": ["HSM-resident", "made in the HSM, and never leaves it"],
  "tpm-resident": ["TPM-resident", "made in the TPM, and never leaves it"],
  "tpm-sealed": ["TPM-sealed", "sealed to this machine's TPM and its measured state; in protected memory while in use"],
  "hsm-recoverable": ["HSM-recoverable", "in the HSM, which does not let it out; M of N recovery holders have a sealed copy"],
  "tpm-recoverable": ["TPM-recoverable", "sealed to this machine's TPM; M of N recovery holders have a sealed copy"],
  imported: ["Imported", "came from outside: copies may exist"],
};

export const keyTone: Record<string, Tone> = {
  active: "ok", pending: "info", "verify-only": "info", archived: "off", compromised: "crit", destroyed: "off",
};

export const keyMeans: Record<string, string> = {
  active: "signs, and its signatures are accepted",
  pending: "the committed successor: it does not sign yet",
  "verify-only": "signs no more; its signatures are accepted until the grace time ends",
  archived: "signs no more, and its signatures are refused",
  compromised: "was marked as compromised: its signatures are refused",
  destroyed: "no longer exists in the device",
};

export const origin: Record<string, string> = {
  generated: "generated in the device, by the device's own word",
  imported: "imported: the device did not make it",
  unreported: "the device made it, and does not say whether it can leave",
};

export const custodyOf = (k: Key) => custody[k.custody] ?? [k.custody, ""];

export const proposalTone: Record<string, Tone> = {
  open: "info", running: "info", done: "ok", failed: "crit", expired: "off", withdrawn: "off", interrupted: "warn",
};

/** tokenAway are the causes with which a token's keys do not sign. */
const tokenAway = ["token-unavailable", "token-pin-refused", "token-locked", "token-replaced", "token-sealed"];

/** sentence tells the state in one line for a tired person. */
export function sentence(h: Health): { tone: Tone; text: string } {
  const n = h.causes.length, stops = h.causes.find((c) => c.stops), away = h.causes.find((c) => tokenAway.includes(c.code));
  switch (h.state) {
    case "uninitialised": return { tone: "info", text: "It is new: nobody is enrolled yet." };
    case "locked": return { tone: "off", text: "Locked: nothing is signed until an administrator unlocks it." };
    case "rolled-back": return { tone: "crit", text: "Stopped: the ledger is older than its counter, so nothing is signed." };
    case "operational":
      return h.alerts?.length ? { tone: h.alerts[0]!.level === "critical" ? "crit" : "warn", text: `It signs. ${h.alerts.length === 1 ? "An alert fires" : h.alerts.length + " alerts fire"}: ${h.alerts[0]!.text}.` }
        : { tone: "ok", text: "All is well: it signs, and nothing needs you." };
    default:
      if (stops) return { tone: "crit", text: `It does not sign: ${stops.text}${n > 1 ? `, and ${n - 1} more` : ""}.` };
      return away ? { tone: "crit", text: `The keys of ${away.subject ? `the token ${away.subject}` : "a token"} can’t be used: ${away.text}${n > 1 ? `, and ${n - 1} more` : ""}.` }
        : { tone: "warn", text: `It signs, and ${n === 1 ? "one thing needs" : n + " things need"} a look: ${h.causes[0]?.text ?? "see the causes"}.` };
  }
}

export const causeTone = (c: Cause): Tone => c.stops ? "crit" : "warn";

/** roleMeans says what a role is for. */
export const roleMeans: Record<string, string> = {
  administrator: "operators, policy, retention, and unlocking",
  operator: "keys and peers, day by day",
  auditor: "reads everything, changes nothing",
  approver: "approves what others propose",
  backup: "fetches the log and backups",
  metrics: "reads figures",
};
