//! Remedies that open a port in a firewall.

use crate::commands::program;
use std::fs;
use std::net::IpAddr;
use std::path::Path;

/// Returns the command or setting that opens a port in this machine's firewall. Runs `firewall-cmd`
/// and `nft` to find out which firewall is in use, and blocks for at most 10 s for each.
pub(super) fn open_port(protocol: &str, port: u16) -> String {
    let output_of = |name: &str, words: &[&str]| program::run(name, words, &[]).unwrap_or_default();
    if Path::new("/etc/NIXOS").exists() {
        return format!(
            "networking.firewall.allowed{}Ports = [ {port} ];",
            protocol.to_uppercase()
        );
    }
    if output_of("firewall-cmd", &["--state"]).trim() == "running" {
        return format!(
            "firewall-cmd --permanent --add-port={port}/{protocol} && firewall-cmd --reload"
        );
    }
    if fs::read_to_string("/etc/ufw/ufw.conf").is_ok_and(|conf| conf.contains("ENABLED=yes")) {
        return format!("ufw allow {port}/{protocol}");
    }
    if let Some(chain) = nft_input_chain(&output_of("nft", &["list", "chains"])) {
        return format!("nft insert rule {chain} {protocol} dport {port} accept");
    }
    format!("iptables -I INPUT -p {protocol} --dport {port} -j ACCEPT")
}

/// Returns family, table and name of the first chain with an input filter hook in the output of
/// `nft list chains`. Skips chains called `INPUT`, which iptables creates.
fn nft_input_chain(listed: &str) -> Option<String> {
    let (mut table, mut chain) = ("", "");
    for line in listed.lines().map(str::trim) {
        let name =
            |word: &str| line.strip_prefix(word).map(|rest| rest.trim_end_matches('{').trim());
        if let Some(named) = name("table ") {
            table = named;
        } else if let Some(named) = name("chain ") {
            chain = named;
        } else if line.starts_with("type filter hook input") && chain != "INPUT" {
            return Some(format!("{table} {chain}"));
        }
    }
    None
}

/// Returns a remedy that opens a port on the machine `ip`. It assumes the same firewall as on this
/// machine and says so, because that machine's firewall is not known. Blocks for at
/// most 20 s.
pub(super) fn open_port_there(ip: IpAddr, protocol: &str, port: u16) -> String {
    let here = open_port(protocol, port);
    format!(
        "on {ip}: {here}\nthat is for a firewall like this machine's; with another one: let in {protocol} port {port}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nft_input_chain_skips_the_chain_of_iptables() {
        let native = "table inet filter {\n\tchain forward {\n\t\ttype filter hook forward priority filter; policy drop;\n\t}\n\
                      \tchain input {\n\t\ttype filter hook input priority filter; policy drop;\n\t}\n}\n";
        assert_eq!(nft_input_chain(native).as_deref(), Some("inet filter input"));
        let of_iptables = "table ip filter {\n\tchain INPUT {\n\t\ttype filter hook input priority filter; policy accept;\n\t}\n}\n";
        assert_eq!(nft_input_chain(of_iptables), None);
        assert_eq!(
            nft_input_chain(&format!("{of_iptables}{native}")).as_deref(),
            Some("inet filter input")
        );
        assert_eq!(nft_input_chain(""), None);
    }
}
