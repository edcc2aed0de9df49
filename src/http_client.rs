//! Settings that all HTTP clients of this program have in common.

use ureq::Agent;
use ureq::config::ConfigBuilder;
use ureq::tls::{RootCerts, TlsConfig};
use ureq::typestate::AgentScope;

/// Largest head of a response, in bytes. Those of peers have 300, those of object stores 2,000.
const MAX_HEAD: usize = 16 * 1024;

/// The settings. Every status is an answer, also a redirect, which is not followed; bodies are not
/// compressed.
pub fn config() -> ConfigBuilder<AgentScope> {
    Agent::config_builder()
        .max_redirects(0)
        .max_redirects_will_error(false)
        .http_status_as_error(false)
        .user_agent(concat!("peerix/", env!("CARGO_PKG_VERSION")))
        .accept_encoding("identity")
        .no_delay(true)
        .max_response_header_size(MAX_HEAD)
}

/// The settings for servers that may be asked over HTTPS: the system's certificates are trusted.
pub fn https_config() -> ConfigBuilder<AgentScope> {
    config().tls_config(TlsConfig::builder().root_certs(RootCerts::PlatformVerifier).build())
}

/// The settings for a cache, which may redirect `max_redirects` times; more is an error. A redirect
/// must not lead from HTTPS to what others on the way can change.
pub fn cache_config(url: &str, max_redirects: u32) -> ConfigBuilder<AgentScope> {
    https_config()
        .https_only(url.starts_with("https://"))
        .max_redirects(max_redirects)
        .max_redirects_will_error(true)
}
