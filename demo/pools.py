"""The values and phrases that the demo's messages are made of: one set to train on, another to be scored on.

The two sets share nothing, word by word: a model that gets the held-out rows right has learned to read an order, not
to repeat one. ``tests/demo`` holds them to it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pools:
    """What one split draws from; numbers and days are dealt out in ``data.py``."""

    first: tuple[str, ...]
    """First names."""
    last: tuple[str, ...]
    """Family names."""
    kinds: tuple[str, ...]
    """First words of an article: ``oak``."""
    things: tuple[str, ...]
    """Last words of an article, in the plural: ``shelves``."""
    phrases: tuple[str, ...]
    """Whole messages with slots for customer, order, total and date."""


def words(text: str) -> tuple[str, ...]:
    """The words of ``text``."""
    return tuple(text.split())


TRAIN = Pools(
    first=words(
        "Maria Jonas Aisha Pedro Linh Oskar Fatima Kenji Ruth Tomas Ingrid Samuel Priya Victor Elena Marcus Yuki "
        "Omar Hannah Diego Leila Stefan Grace Andrei Chloe Rashid Nadia Patrick Sofia Wei Bruno Amara Felix "
        "Joanna Tariq Monica Erik Zainab Paul Camille Nina Robert Irene Hassan Emily Carlos Sven Beatrice Kwame "
        "Alice Dmitri Lucia Simon Naomi Gustav Helen Rafael Astrid George Mina Walter Pilar Jakub Olivia Emre "
        "Martha Hugo Selma Nelson Vera Abdul Judith Kai Rebecca Stanley Ines Boris Audrey Jorge Edith Gabriel "
        "Lena Mateus Sara Piotr Ayumi Jamal Greta Thomas Ximena Arjun Birgit Cedric Dalia Emil Farah Gideon Hilda "
        "Igor Jasmine Karl Layla Milan Nuria Otto Petra Quentin Rania Sergio Thea Umar Valerie Wilhelm Yara "
        "Zoltan Agnes Benedict Cecilia Dominic Esther Franz Gloria Hamza Isabel Jerome Katrin Lorenzo Margot "
        "Nikolai Octavia Philip Rosalind Sebastian Tamara Ulrich Violet Wanda Yusuf Zoe Albert Bianca Cyrus "
        "Dorothy Enzo Fiona Gerald Harriet Imran Jolanta Konrad Lydia Malcolm Nadine Orlando Peggy Raymond Sabine "
        "Timothy Ursula Vincent"
    ),
    last=words(
        "Lopez Lindqvist Rahman Carvalho Nguyen Weber Haddad Tanaka Goldberg Novak Larsen Okafor Sharma Dubois "
        "Petrova Hughes Sato Farouk Schmidt Morales Nazari Keller Osei Popescu Bernard Aziz Kowalska Murphy Ricci "
        "Zhang Costa Mensah Brandt Sikora Mahmood Silva Nilsson Bello Turner Laurent Hall Bianchi Yamada Torres "
        "Wolf Ferrari Clark Adeyemi Kovacs Lambert Reid Barbosa Hansen Demir Fuchs Gomez Parker Qureshi Jensen "
        "Blanc Wagner Noor Evans Ortega Pavlov Roth Byrne Suzuki Marino Foster Vega Lund Abbasi Price Hartmann "
        "Duarte Shaw Lemaire Ali Bauer Ackermann Baptiste Cardoso Delgado Eriksen Fontaine Grant Hoffmann Ibrahim "
        "Jankowski Kimura Lindgren Medina Nakamura Olsen Pereira Quinn Ramirez Steiner Thompson Usman Vargas "
        "Winter Yilmaz Zimmermann Ashford Bergstrom Cruz Dawson Engel Fitzgerald Gallo Hughson Iversen Jovanovic "
        "Khan Lopes Mitchell Neumann Okonkwo Pham Ruiz Simmons Takahashi Underwood Villanueva Watanabe Young "
        "Zielinski Abbott Bouchard Chandra Dimitrov Ekström Francis Gupta Harrison Ito Jacobs Knudsen Leroy Mbeki "
        "Nikolaidis Oduya Papadakis Rinaldi Stewart Tran Uddin Vasquez Whitfield Yamamoto Zamora Archer Blake "
        "Coleman Dunne Eaton Fleming Griffith"
    ),
    kinds=words(
        "desk oak wool garden steel ceramic leather cotton paper copper kitchen travel silver winter plastic "
        "canvas bamboo rubber pocket marble bicycle folding office velvet round black fleece hotel spare baby "
        "cork birch granite summer nylon square yellow school bronze denim outdoor tin felt wicker maple beach "
        "heavy crystal roof blue jute hiking storage tall corner fish golden clay sports flat woven painted "
        "narrow wide foldable woodland metal chrome sandstone crimson purple orange white brown grey scarlet "
        "amber ivory turquoise padded quilted thermal electric solar portable antique modern rustic vintage "
        "Swedish Turkish Italian nautical rural gentle double triple mini giant light soft thick thin glossy "
        "matte waterproof insulated stackable wireless magnetic adjustable recycled organic leafy floral dotted "
        "plain curved arched"
    ),
    things=words(
        "lamps shelves blankets chairs bolts mugs wallets shirts folders kettles knives bags spoons coats buckets "
        "tents trays gloves mirrors tiles helmets tables pens curtains ropes plates hats candles brushes clocks "
        "boxes rugs pillows screws jackets frames ladders forks cables socks jars doors belts notebooks pumps "
        "crates cups sheets handles filters boots racks bottles rings magnets aprons drawers wheels sofas fans "
        "planters hammocks lanterns whisks trolleys easels barrels zips anvils bowls cabinets pedals keyboards "
        "pouches ovens saws drills chisels wrenches pliers spades rakes hoses gutters gates fences bells flags "
        "posters stamps envelopes staplers markers erasers rulers calendars scales timers thermometers heaters "
        "dryers irons toasters blenders grinders teapots saucers goblets pitchers coasters ottomans dressers "
        "wardrobes mattresses duvets rackets skates paddles saddles"
    ),
    phrases=(
        "{customer} here, I need {order} before {date}, my budget is {total}",
        "{customer} called: wants {order} for {total}, pick-up on {date}.",
        "{customer} confirms {total} for {order}, arriving {date}, as we said in our chat",
        "{customer}, {order}, {total}, {date}. Confirm please",
        "{customer} asks whether {order} can be at the door on {date}; pays {total}",
        "{customer} again. For {total} I'll take {order}, but only if they are here by {date}.",
        "Hi, please send {order} by {date}. We agreed on {total}. Thanks!\n{customer}",
        "Hello, I would like to order {order} for {total}. They must arrive on {date}.\nRegards,\n{customer}",
        "pls ship {order}, total {total}, needed {date}, thx\n{customer}",
        "Order: {order}, {total}, due {date}.\n{customer}",
        "By {date} we want {order}. Make the invoice over {total} out to\n{customer}",
        "Good morning! I paid {total} for {order}. Can they come on {date}?\n{customer}",
        "could you get me {order} until {date}? can spend {total}. cheers\n{customer}",
        "Dear team, {total} was transferred for {order}. Delivery date: {date}.\nYours,\n{customer}",
        "{order} please, delivery {date}, price as quoted {total}.\n{customer}",
        "need {order} asap, latest {date}!! {total} is ok\n\n{customer}",
        "On {date} I am expecting {order}, which cost {total}.\nGreetings,\n{customer}",
        "Hey, {date} works for us. {order} at {total} all in. Bye!\n{customer}",
        "{total} is on its way, so reserve {order} until {date}.\n\n{customer}",
        "{date} is the day of our fair and we are short of {order}. {total} at most.\n{customer}",
        "Am I too late? {order} should reach me on {date}, {total} is ready.\nYour customer\n{customer}",
        "You have {total} of mine. In return I expect {order} on {date}. Signed,\n{customer}",
        "The {order} can wait till {date}. I pay {total} then.\n{customer}",
        "Yesterday I saw {order} valued at {total} on your site. Bring them on {date}, please, to\n{customer}",
    ),
)

HELD_OUT = Pools(
    first=words(
        "Anna Luis Mei Henrik Salma Noah Olga Kofi Clara Ivan Teresa Hiro Julia Ahmed Rosa Daniel Freya Matteo "
        "Sana Lucas Viktor Amina Tobias Renata Callum Sakura Rodrigo Elise Ibrahima Marta Jonathan Leonor Anton "
        "Bridget Farid Gemma Oscar Pauline Reza Svetlana"
    ),
    last=words(
        "Fischer Garcia Chen Andersen Karimi Walker Ivanova Boateng Martin Horvat Santos Mori Becker Saleh Romano "
        "Cooper Holm Conti Malik Moreau Bennett Castillo Dahl Esposito Friedman Gruber Hoang Inoue Jimenez Kaplan "
        "Lehmann Mwangi Nowak Orlov Patel Richter Sullivan Teixeira Voss Wójcik"
    ),
    kinds=words(
        "pine silk glass brass picnic wooden linen bathroom camping iron plaid striped walnut suede pearl garage "
        "indoor chequered lavender bulky cedar enamel hexagonal mossy nursery satin sturdy travertine upholstered "
        "wedding zinc crochet"
    ),
    things=words(
        "benches scarves vases hinges baskets stools napkins towels stoves pans printers cushions ladles parasols "
        "bookends carpets doorbells funnels gongs hangers jugs kites latches mats notepads ornaments pots quilts "
        "ramps sledges trunks urns"
    ),
    phrases=(
        "{customer} speaking. I'd like {order} delivered on {date} at a cost of {total}.",
        "{customer} wants to buy {order}, offered {total}, deadline {date}",
        "Please book {order} for me, {total} in total, no later than {date}.\nBest,\n{customer}",
        "New purchase: {order} worth {total}, wanted on {date}\n{customer}",
        "We have {total} to spend on {order} and must get them by {date}.\nKind regards,\n{customer}",
        "{date} is our deadline for {order}. We will pay {total}.\n{customer}",
        "Hi there, please put aside {order}. Collection on {date}, paying {total}.\n\n{customer}",
        "Send me {order}. I have set aside {total}. Arrival {date} is fine.\nMany thanks,\n{customer}",
    ),
)
