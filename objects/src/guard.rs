//! Which addresses may be called. **Pure**.
//!
//! A coordinator that fetches what a client names could be made to ask for things that only it can reach: services that
//! listen on its loopback, or the service of its cloud that gives out the machine's credentials. So it is the address that
//! is looked at, after names were resolved and for every redirect, not the URL.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// How far calls may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reach {
    /// Everywhere: the operator of this machine says where, by its environment or its flags.
    Everywhere,
    /// Wherever a user of this machine could get by himself: not to what gives out the machine's credentials.
    ThisMachine,
    /// Not to this machine itself either: somebody elsewhere says where.
    Network,
}

impl Reach {
    /// Why that address may not be called, if it may not.
    pub fn refusal(self, address: IpAddr) -> Option<&'static str> {
        let address = plain(address);
        match self {
            Self::Everywhere => None,
            _ if is_of_link(address) => {
                Some("it is of the link alone, where clouds give out a machine's credentials")
            }
            Self::Network if address.is_loopback() => Some("it is the coordinator's own machine"),
            _ if address.is_unspecified() || address.is_multicast() => {
                Some("it is nobody's address")
            }
            _ => None,
        }
    }
}

/// An IPv4 address that is written as one of IPv6.
fn plain(address: IpAddr) -> IpAddr {
    let IpAddr::V6(v6) = address else {
        return address;
    };
    let bytes = v6.octets();
    let last = Ipv4Addr::new(bytes[12], bytes[13], bytes[14], bytes[15]);
    // What translators stand for, 64:ff9b::/96, is IPv4 as well.
    let translated = bytes[..12] == [0, 0x64, 0xff, 0x9b, 0, 0, 0, 0, 0, 0, 0, 0];
    match v6.to_ipv4_mapped() {
        Some(v4) => v4.into(),
        None if translated => last.into(),
        None => address,
    }
}

fn is_of_link(address: IpAddr) -> bool {
    match address {
        // The last is where one cloud has it outside of the link's addresses.
        IpAddr::V4(v4) => v4.is_link_local() || v4 == Ipv4Addr::new(100, 100, 100, 200),
        IpAddr::V6(v6) => {
            v6.is_unicast_link_local() || v6 == Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_is_sent_to_where_credentials_are_given_out() {
        for address in [
            "169.254.169.254",
            "::ffff:169.254.169.254",
            "64:ff9b::a9fe:a9fe",
            "fe80::1",
            "fd00:ec2::254",
            "100.100.100.200",
            "0.0.0.0",
            "::",
            "224.0.0.1",
        ] {
            let address = address.parse().unwrap();
            assert!(Reach::Network.refusal(address).is_some(), "{address}");
            assert!(Reach::ThisMachine.refusal(address).is_some(), "{address}");
            assert!(Reach::Everywhere.refusal(address).is_none(), "{address}");
        }
    }

    #[test]
    fn this_machine_is_for_its_own_users() {
        for address in ["127.0.0.1", "127.1.2.3", "::1", "::ffff:127.0.0.1"] {
            let address = address.parse().unwrap();
            assert!(Reach::Network.refusal(address).is_some(), "{address}");
            assert!(Reach::ThisMachine.refusal(address).is_none(), "{address}");
        }
        for address in ["10.0.0.1", "192.168.1.1", "1.1.1.1", "2606:4700::1111"] {
            let address = address.parse().unwrap();
            assert!(Reach::Network.refusal(address).is_none(), "{address}");
        }
    }
}
