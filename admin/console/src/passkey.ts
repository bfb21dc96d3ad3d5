// Passkeys: WebAuthn with the forms of the admin API.
import { Refused } from "./api";
import { sha256, utf8 } from "./bytes";
import type { Proof } from "./generated";

/** told names what the browser's errors mean for a person. */
function told(e: unknown): Refused {
  const name = (e as DOMException).name;
  if (name === "NotAllowedError") {
    return new Refused("cancelled", "No passkey was used",
      "The browser's dialog was closed, took too long, or no passkey of this device fits. Try again, with the device that has the passkey.");
  }
  if (name === "InvalidStateError") {
    return new Refused("cancelled", "This device has a passkey already",
      "Use another device or security key: one passkey of an operator for each.");
  }
  return new Refused("cancelled", "The passkey could not be used", String((e as Error).message));
}

/** assertion has a passkey sign what the options ask for. */
export async function assertion(options: unknown): Promise<Proof> {
  let made: PublicKeyCredential;
  try {
    made = await navigator.credentials.get({ publicKey: PublicKeyCredential.parseRequestOptionsFromJSON(options as PublicKeyCredentialRequestOptionsJSON) }) as PublicKeyCredential;
  } catch (e) { throw told(e); }
  const { id, response } = made.toJSON() as AuthenticationResponseJSON;
  return {
    credential: id,
    assertion: {
      authenticator_data: response.authenticatorData, client_data_json: response.clientDataJSON, signature: response.signature,
    },
  };
}

/** registration makes a passkey. */
export async function registration(options: unknown): Promise<unknown> {
  try {
    const made = await navigator.credentials.create({ publicKey: PublicKeyCredential.parseCreationOptionsFromJSON(options as PublicKeyCredentialCreationOptionsJSON) });
    return (made as PublicKeyCredential).toJSON();
  } catch (e) { throw told(e); }
}

/** signText has a passkey sign SHA-256 of a text: an approval. */
export async function signText(text: string, credentials: string[]): Promise<Proof> {
  return assertion({
    challenge: base64url(await sha256(utf8(text))), rpId: location.hostname, userVerification: "required",
    allowCredentials: credentials.map((id) => ({ type: "public-key", id })),
  });
}

function base64url(b: Uint8Array): string {
  return btoa(String.fromCharCode(...b)).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}
