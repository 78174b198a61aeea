// The npm package oidc-provider over TLS, for tests: `node server.mjs FOLDER`, with provider.pem and provider.key there. It prints its
// issuer, and reads FOLDER/settings.json ({client, redirect, keys, groups}) at each SIGHUP; any password signs in.
import { readFileSync } from "node:fs";
import { createServer } from "node:https";
import Provider from "oidc-provider";

const folder = process.argv[2];
const read = (name) => readFileSync(`${folder}/${name}`, "utf8");
let answer;

function configured(issuer) {
  const { client, redirect, keys, groups } = JSON.parse(read("settings.json"));
  const provider = new Provider(issuer, {
    clients: [
      { client_id: client, token_endpoint_auth_method: "none", redirect_uris: [redirect], id_token_signed_response_alg: "ES256" },
    ],
    jwks: { keys },
    cookies: { keys: ["of a test"] },
    findAccount: (_, id) => ({ accountId: id, claims: () => ({ sub: id }) }),
    // An access token that is a JWT for the gateways, whatever resource was asked for.
    features: {
      resourceIndicators: {
        enabled: true,
        defaultResource: () => "urn:llm",
        useGrantedResource: () => true,
        getResourceServerInfo: () => ({
          scope: "", audience: "llm", accessTokenFormat: "jwt", accessTokenTTL: 300, jwt: { sign: { alg: "ES256" } },
        }),
      },
    },
    extraTokenClaims: (_, token) => ({ tenant: "corp", groups: groups[token.accountId] }),
  });
  return provider.callback();
}

const server = createServer({ cert: read("provider.pem"), key: read("provider.key") }, (...exchange) => answer(...exchange));
server.listen(0, "127.0.0.1", () => {
  const issuer = `https://localhost:${server.address().port}`;
  process.on("SIGHUP", () => {
    answer = configured(issuer);
    console.log("configured");
  });
  console.log(issuer);
});
