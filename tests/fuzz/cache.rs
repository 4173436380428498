//! Seeds of presence maps and image tables, and of messages to and from the fetcher.

use std::fs::File;
use std::io::Read;

use ovbd_vhost::format::digest::Digest;
use ovbd_vhost::format::presence::{Header, Identity, UNIT};
use ovbd_vhost::source::FetchErrorKind;
use ovbd_vhost::source::protocol::{Cause, Reply, Request, Subject};

use ovbd_vhost::format::tables;
use ovbd_vhost::image::Image;
use ovbd_vhost::image::tables::TablesWriter;

use super::{folder, small_stack, write};

#[test]
fn presence() {
    let seeds = [1, UNIT, 100 * UNIT + 1].map(|len| {
        let identity = Identity::new(Digest::of(b"fuzz"), len).unwrap();
        let mut seed = (len as u32).to_le_bytes().to_vec();
        seed.extend(Header::new_map(&identity));
        seed.resize(4 + identity.map_len() as usize, 0x5a);
        seed
    });
    assert_eq!(write(&folder("presence"), seeds), 3);
}

#[test]
fn fetch_messages() {
    let fetch = |cause| Request::Fetch {
        ticket: 1,
        blob: 2,
        offset: 3 << 16,
        len: 4096,
        cause,
    };
    let requests = [
        Request::Open { blob: 0 },
        fetch(Cause::Start),
        fetch(Cause::Repair),
    ];
    let (blob, len, complete) = (7, 1 << 20, true);
    let replies = [
        Reply::Hello,
        Reply::Ready { ticket: 5 },
        Reply::Opened {
            blob,
            len,
            complete,
        },
        Reply::Failed {
            subject: Subject::Ticket(5),
            kind: FetchErrorKind::NotFound,
            reason: "r.example does not have it".to_owned(),
        },
    ];
    let requests = requests.map(|request| request.encode().to_vec());
    let replies = replies.map(|reply| reply.encode().to_vec());
    let seeds = requests.into_iter().chain(replies);
    assert_eq!(write(&folder("fetch_messages"), seeds), 7);
}

#[test]
fn image_tables() {
    let stack = small_stack::open();
    let key = tables::key(&stack.identities().unwrap().unwrap());
    let folder = folder("tables");
    let path = folder.join("written");
    let mut options = File::options();
    let file = options.read(true).write(true).create_new(true).open(&path);
    let image = Image::load(stack).expect("a sound stack");
    let written = TablesWriter::new(file.unwrap(), key).write(&image);
    let mut bytes = Vec::new();
    File::open(&path).unwrap().read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes.len() as u64, written.unwrap());
    assert_eq!(write(&folder, [bytes]), 1);
}
