//! Where other workers find this one: at the address by which this machine reaches the coordinator, unless the user knows
//! better.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use cohort_common::net::Places;
use tokio::net::{TcpListener, UdpSocket, lookup_host};
use tracing::info;

use crate::exchange::Entrance;
use crate::{Config, EntranceAddress, Error};

/// Listens for other workers. Where nothing is said and nothing can be found out, they cannot push here, which costs
/// speed at most.
///
/// # Errors
/// If the address that the user wants cannot be had.
pub async fn open(config: &Config) -> Result<Option<Entrance>, Error> {
    let wanted = match config.entrance {
        EntranceAddress::Nowhere => return Ok(None),
        EntranceAddress::At(address) => Some(address),
        EntranceAddress::Auto => None,
    };
    let known = wanted.map(|address| address.ip());
    let here = match known.filter(|ip| !ip.is_unspecified()) {
        Some(ip) => Some(ip),
        None => own_address(&config.coordinators).await,
    };
    let Some(here) = here else {
        info!("this machine's address is not known: other workers cannot push gradients here");
        return Ok(None);
    };
    let address = wanted.unwrap_or_else(|| SocketAddr::new(here, 0));
    let guarded = config.token.is_some() || config.trust.is_some();
    if !guarded && !address.ip().is_loopback() {
        // Whoever reaches it could change what is trained.
        if wanted.is_some() {
            return Err(Error::OpenEntrance(address));
        }
        info!(%address, "without a token other workers cannot push gradients here");
        return Ok(None);
    }
    let listener = match TcpListener::bind(address).await {
        Ok(listener) => listener,
        Err(source) if wanted.is_some() => return Err(Error::Entrance { address, source }),
        Err(error) => {
            info!(%address, %error, "other workers cannot push gradients here");
            return Ok(None);
        }
    };
    let port = match listener.local_addr() {
        Ok(bound) => bound.port(),
        Err(source) => return Err(Error::Entrance { address, source }),
    };
    let address = SocketAddr::new(here, port);
    Ok(Some(Entrance::open(
        listener,
        address,
        config.token.clone(),
        config.trust.as_ref(),
    )))
}

/// The address of this machine by which it would reach the first coordinator whose name is known.
async fn own_address(coordinators: &Places) -> Option<IpAddr> {
    for url in coordinators.urls() {
        if let Some(address) = address_towards(url).await {
            return Some(address);
        }
    }
    None
}

/// The address of this machine by which it would reach a URL. Nothing is sent to find out.
async fn address_towards(url: &str) -> Option<IpAddr> {
    let (_, authority) = url.split_once("://")?;
    let authority = authority.trim_end_matches('/');
    let there = lookup_host(authority).await.ok()?.next()?;
    let any: IpAddr = match there {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).await.ok()?;
    socket.connect(there).await.ok()?;
    let here = socket.local_addr().ok()?.ip();
    (!here.is_unspecified()).then_some(here)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn whoever_reaches_the_coordinator_by_loopback_is_there() {
        let found = address_towards("http://127.0.0.1:7070/").await;
        assert_eq!(found, Some(Ipv4Addr::LOCALHOST.into()));
        let found = address_towards("https://127.0.0.1:7070").await;
        assert_eq!(found, Some(Ipv4Addr::LOCALHOST.into()));
        assert_eq!(address_towards("nonsense").await, None);
    }
}
