//! Addresses to which a server must not send this program.
//!
//! A redirect's target and a token server are named by the registry. A hostile one could name a
//! service that only this machine reaches, such as a cloud's metadata service, and hand what it
//! answers to a guest.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::repository::Host;

/// Metadata services outside the link-local networks: AWS over IPv6, Alibaba Cloud, Azure.
const METADATA: [IpAddr; 3] = [
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)),
    IpAddr::V4(Ipv4Addr::new(100, 100, 100, 200)),
    IpAddr::V4(Ipv4Addr::new(168, 63, 129, 16)),
];

/// Where a local address leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Locality {
    /// To this machine: loopback or unspecified.
    Machine,
    /// To what only this machine may reach: link-local, broadcast or a metadata service.
    Link,
}

/// The party that chose the host of a request; the least trusted last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum NamedBy {
    /// The user's: any address.
    User,
    /// A server's on this machine: no address of this machine's link.
    Neighbor,
    /// A server's: no address of this machine or its link.
    Server,
}

impl NamedBy {
    /// Whether a host may have this address.
    pub(super) fn may_reach(self, address: IpAddr) -> bool {
        match self {
            NamedBy::User => true,
            NamedBy::Neighbor => locality_of(address) != Some(Locality::Link),
            NamedBy::Server => locality_of(address).is_none(),
        }
    }
}

/// Where `address` leads; `None` for an address that is valid beyond this machine and its link.
pub(super) fn locality_of(address: IpAddr) -> Option<Locality> {
    let address = embedded_v4(address);
    let (machine, link) = match address {
        IpAddr::V4(v4) => {
            let this_network = v4.octets()[0] == 0;
            (
                v4.is_loopback() || this_network,
                v4.is_link_local() || v4.is_broadcast(),
            )
        }
        IpAddr::V6(v6) => (
            v6.is_loopback() || v6.is_unspecified(),
            v6.is_unicast_link_local(),
        ),
    };
    match machine {
        true => Some(Locality::Machine),
        false => (link || METADATA.contains(&address)).then_some(Locality::Link),
    }
}

/// Where `host` leads, if it is an address or a name of this machine.
pub(super) fn locality(host: &Host) -> Option<Locality> {
    let name = host.name();
    if name == "localhost" || name.ends_with(".localhost") {
        return Some(Locality::Machine);
    }
    literal(name).and_then(locality_of)
}

/// Whether `host` is a name of this machine, or a loopback or unspecified address.
pub(super) fn names_this_machine(host: &Host) -> bool {
    locality(host) == Some(Locality::Machine)
}

/// Whether `host` is a name of this machine, or an address that is loopback, link-local, unspecified
/// or a metadata service's.
pub fn names_local(host: &Host) -> bool {
    locality(host).is_some()
}

/// The address that `name` is; IPv6 in brackets. Also the forms that only `inet_aton` knows
/// (`127.1`, `0x7f000001`, `2130706433`), which a resolver may turn into addresses.
fn literal(name: &str) -> Option<IpAddr> {
    let inner = name
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'));
    if let Ok(address) = inner.unwrap_or(name).parse() {
        return Some(address);
    }
    let parts: Vec<_> = name.split('.').collect();
    let (last, first) = parts.split_last().filter(|_| parts.len() <= 4)?;
    let mut value: u64 = 0;
    for part in first {
        value = value << 8 | number(part).filter(|byte| *byte < 256)?;
    }
    let bits = 8 * (4 - first.len());
    let last = number(last).filter(|last| *last < 1 << bits)?;
    let value = u32::try_from(value << bits | last).ok()?;
    Some(IpAddr::V4(Ipv4Addr::from_bits(value)))
}

fn number(text: &str) -> Option<u64> {
    if let Some(digits) = text.strip_prefix("0x") {
        return u64::from_str_radix(digits, 16).ok();
    }
    let base = if text.len() > 1 && text.starts_with('0') {
        8
    } else {
        10
    };
    u64::from_str_radix(text, base).ok()
}

/// The IPv4 address inside a mapped (`::ffff:0:0/96`), compatible (`::/96`) or translated
/// (`64:ff9b::/96`) IPv6 address.
fn embedded_v4(address: IpAddr) -> IpAddr {
    let IpAddr::V6(v6) = address else {
        return address;
    };
    let [a, b, c, d, e, f, high, low] = v6.segments();
    let embedded = match [a, b, c, d, e, f] {
        [0, 0, 0, 0, 0, 0xffff] | [0x64, 0xff9b, 0, 0, 0, 0] => true,
        // `::` and `::1` are not embedded addresses.
        [0, 0, 0, 0, 0, 0] => high != 0,
        _ => false,
    };
    if !embedded {
        return address;
    }
    IpAddr::V4(Ipv4Addr::from_bits(u32::from(high) << 16 | u32::from(low)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn local(text: &str) -> bool {
        names_local(&text.parse().unwrap_or_else(|error| panic!("{error}")))
    }

    #[test]
    fn local_addresses_are_seen_in_every_form() {
        for text in [
            "localhost",
            "LOCALHOST:80",
            "a.localhost",
            "127.0.0.1",
            "127.1:80",
            "127.0.1",
            "0x7f000001",
            "2130706433",
            "0177.0.0.1",
            "0.0.0.0",
            "0",
            "169.254.169.254:80",
            "0xa9fea9fe",
            "2852039166",
            "255.255.255.255",
            "[::]",
            "[::1]:5000",
            "[fe80::1]",
            "[::ffff:127.0.0.1]",
            "[::ffff:169.254.169.254]",
            "[64:ff9b::169.254.169.254]",
            "[::127.0.0.1]",
            "[fd00:ec2::254]",
            "100.100.100.200",
            "168.63.129.16",
        ] {
            assert!(local(text), "{text}");
        }
    }

    #[test]
    fn this_machine_is_told_from_its_link() {
        let at = |text: &str| locality(&text.parse().unwrap());
        for text in [
            "localhost:1",
            "127.1",
            "[::1]",
            "0.0.0.0",
            "[::ffff:127.0.0.1]",
        ] {
            assert_eq!(at(text), Some(Locality::Machine), "{text}");
        }
        for text in [
            "169.254.169.254",
            "[fe80::1]",
            "[::ffff:169.254.0.1]",
            "168.63.129.16",
            "[fd00:ec2::254]",
        ] {
            assert_eq!(at(text), Some(Locality::Link), "{text}");
        }
    }

    #[test]
    fn other_addresses_are_not_local() {
        for text in [
            "r.example",
            "localhost.example",
            "notlocalhost",
            "10.0.0.1",
            "192.168.1.1",
            "8.8.8.8",
            "[2001:db8::1]",
            "[fd00::1]",
            "[::ffff:10.0.0.1]",
            "256.1.1.1",
            "127",
            "1.2.3.4.5",
            "cafe",
            "0x",
            "172.16.0.1:443",
        ] {
            let expected = text == "127"; // 0.0.0.127 is of "this network"
            assert_eq!(local(text), expected, "{text}");
        }
    }
}
