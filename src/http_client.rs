//! Settings shared by all HTTP clients of this program.

use ureq::Agent;
use ureq::config::ConfigBuilder;
use ureq::tls::{RootCerts, TlsConfig};
use ureq::typestate::AgentScope;

/// Largest response head, in bytes. A longer one is an error. Heads of peers have 300 bytes, those
/// of object stores 2,000.
const MAX_HEAD: usize = 16 * 1024;

/// Base settings. No status is an error, redirects are not followed, and the client asks for
/// uncompressed bodies.
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

/// Settings for servers with HTTPS. The client trusts the system's certificate authorities.
pub fn https_config() -> ConfigBuilder<AgentScope> {
    config().tls_config(TlsConfig::builder().root_certs(RootCerts::PlatformVerifier).build())
}

/// Settings for a binary cache. More than `max_redirects` redirects are an error. Redirects from
/// HTTPS to HTTP are refused, because others could alter the response on the way.
pub fn cache_config(url: &str, max_redirects: u32) -> ConfigBuilder<AgentScope> {
    https_config()
        .https_only(url.starts_with("https://"))
        .max_redirects(max_redirects)
        .max_redirects_will_error(true)
}
