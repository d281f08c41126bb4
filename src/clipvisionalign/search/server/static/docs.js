"use strict";
// Without deep links: the page's own address may hold the token.
SwaggerUIBundle({ url: "/openapi.json", dom_id: "#interface", validatorUrl: null, tryItOutEnabled: true });
