//! An owner and workers that answer what they should not.

use actors::transport::TransportError;
use futures::{AsyncReadExt, AsyncWriteExt, StreamExt};
use protocol::wire::encode;

use super::*;

/// What a worker does with a stream after it has read the header and the body.
#[derive(Clone)]
enum Misdeed {
    Sends(Vec<u8>),
    SendsAndWaits(Vec<u8>),
    /// Column by column, each in time.
    Trickles,
    Drops,
}

/// The error that an owner gets from a worker that does so.
async fn error_of(misdeed: Misdeed) -> TransportError {
    let worker = node(SwarmRole::Worker, &[TCP], vec![]).await;
    let mut incoming = worker.streams().accept(PRODUCT_PROTOCOL).unwrap();
    let task = tokio::spawn(async move {
        while let Some((_, mut stream)) = incoming.next().await {
            let misdeed = misdeed.clone();
            tokio::spawn(async move {
                let request = request(5, 9, 16, 8);
                let mut request = vec![0; encode(&request.header).unwrap().len() + body_bytes(&request).len()];
                match misdeed {
                    Misdeed::Drops => return,
                    Misdeed::Sends(bytes) => {
                        stream.read_exact(&mut request).await.unwrap();
                        stream.write_all(&bytes).await.unwrap();
                    }
                    Misdeed::SendsAndWaits(bytes) => {
                        stream.read_exact(&mut request).await.unwrap();
                        stream.write_all(&bytes).await.unwrap();
                        stream.flush().await.unwrap();
                        std::future::pending().await
                    }
                    Misdeed::Trickles => {
                        stream.read_exact(&mut request).await.unwrap();
                        for column in 0..8 {
                            let bytes = [&tile(5, column as u32, 1), column_of_answer(column).as_slice()].concat();
                            tokio::time::sleep(Duration::from_millis(700)).await;
                            // The owner may hang up first.
                            let _ = stream.write_all(&bytes).await;
                            let _ = stream.flush().await;
                        }
                    }
                }
                // The owner may hang up first.
                let _ = stream.close().await;
            });
        }
    });
    let limit = Duration::from_secs(1);
    let config = TransportConfig { stall: limit, first_tile: limit, next_tile: limit, ..Default::default() };
    let transport = owner_of(&worker, TransportConfig { max_tile_bytes: 3 * 9 * 6, ..config }).await;
    let request = request(5, 9, 16, 8);
    let name = peer_name(worker.local_peer());
    let mut tiles = transport.product(&name, request.clone()).await.unwrap();
    let error = loop {
        match tokio::time::timeout(PATIENCE, tiles.recv()).await.expect("an end").expect("an error before the end") {
            Ok(tile) => assert!(tile == fake_tile(&request, tile.first_column, tile.rows.columns())),
            Err(error) => break error,
        }
    };
    assert!(tiles.recv().await.is_none(), "nothing follows an error");
    task.abort();
    error
}

fn tile(call: u64, first_column: u32, columns: u32) -> Vec<u8> {
    encode(&ProductReply::Tile(TileHeader { call, first_column, columns })).unwrap()
}

/// One column as it should be.
fn column_of_answer(column: usize) -> Vec<u8> {
    fake_tile(&request(5, 9, 16, 8), column, 1).rows.bytes().to_vec()
}

/// Columns 0 to 3 as they should be.
fn good_tile() -> Vec<u8> {
    let request = request(5, 9, 16, 8);
    [&tile(5, 0, 4), fake_tile(&request, 0, 4).rows.bytes()].concat()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_that_break_the_protocol() {
    let twice = [good_tile(), tile(5, 3, 1)].concat();
    let prefix = |length: u32| [PROTOCOL_VERSION.to_le_bytes(), length.to_le_bytes()].concat();
    let mut foreign = tile(5, 0, 4);
    foreign[0] = 9;
    let cases = [
        (tile(5, 4, 5), "5 columns from 4 of a product with 8"),
        (tile(5, u32::MAX, u32::MAX), "columns"),
        (tile(6, 0, 4), "call 6"),
        (tile(5, 0, 7), "too large"),
        (twice, "column 3 came twice"),
        (foreign, "version 9"),
        (prefix(u32::MAX), "16384"),
        ([prefix(2), vec![77, 77]].concat(), "no product reply"),
        ([good_tile(), prefix(1), vec![9]].concat(), "no product reply"),
    ];
    for (bytes, expected) in cases {
        let error = error_of(Misdeed::Sends(bytes)).await;
        assert!(matches!(error, TransportError::Protocol { .. }), "{expected}: {error}");
        assert!(error.to_string().contains(expected), "{expected}: {error}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_that_do_not_come() {
    let cases = [
        (Misdeed::Drops, "the stream"),
        (Misdeed::Sends(vec![]), "the stream was closed"),
        (Misdeed::Sends(good_tile()), "the stream was closed"),
        (Misdeed::Sends(good_tile()[..60].to_vec()), "the stream broke"),
        (Misdeed::SendsAndWaits(vec![]), "no tile within 1s"),
        (Misdeed::SendsAndWaits(vec![4, 0]), "no tile within 1s"),
        (Misdeed::SendsAndWaits(good_tile()), "4 columns missing"),
        (Misdeed::Trickles, "the answer was not whole within 3s"),
        (Misdeed::SendsAndWaits(good_tile()[..60].to_vec()), "nothing was received for 1s"),
    ];
    for (misdeed, expected) in cases {
        let error = error_of(misdeed).await;
        assert!(matches!(error, TransportError::Unreachable { .. }), "{expected}: {error}");
        assert!(error.to_string().contains(expected), "{expected}: {error}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_serves_nothing() {
    let peer = node(SwarmRole::Owner, &[TCP], vec![]).await;
    let transport = owner_of(&peer, TransportConfig::default()).await;
    let name = peer_name(peer.local_peer());
    let error = transport.control(&name, ControlRequest::Health).await.unwrap_err();
    assert!(matches!(error, TransportError::Refused { refusal: Refusal::Failed(_), .. }), "{error}");
    let error = transport.product(&name, request(1, 9, 16, 8)).await.unwrap_err();
    assert!(error.to_string().contains("does not speak /velum/product/2"), "{error}");
}
