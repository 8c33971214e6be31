# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: SIM905 -- a list of single words reads best as a text
"""Word lists and small facts that the demo corpus is made of.

Kept apart from ``corpus`` so that the generator reads as rules only.
"""

from __future__ import annotations

__all__ = [
    "ABOUT",
    "ANIMALS",
    "CAPITALS",
    "COLOURS",
    "COLOUR_NAMES",
    "EMOJI",
    "GREETINGS",
    "NAMES",
    "SOUNDS",
    "SYLLABLES",
    "SYSTEMS",
    "TOPICS",
    "WORDS",
]


def _pairs(text: str) -> dict[str, str]:
    """``"a:b, c:d"`` as a mapping."""
    entries = (entry.strip().split(":") for entry in text.split(",") if entry.strip())
    return {key.strip(): value.strip() for key, value in entries}


CAPITALS = _pairs(
    """
    France:Paris, Germany:Berlin, Italy:Rome, Spain:Madrid, Portugal:Lisbon, Austria:Vienna,
    Switzerland:Bern, Belgium:Brussels, the Netherlands:Amsterdam, Denmark:Copenhagen,
    Sweden:Stockholm, Norway:Oslo, Finland:Helsinki, Iceland:Reykjavik, Ireland:Dublin,
    the United Kingdom:London, England:London, Scotland:Edinburgh, Wales:Cardiff, Poland:Warsaw,
    Hungary:Budapest, Romania:Bucharest, Bulgaria:Sofia, Greece:Athens, Turkey:Ankara,
    Ukraine:Kyiv, Russia:Moscow, Estonia:Tallinn, Latvia:Riga, Lithuania:Vilnius,
    Croatia:Zagreb, Serbia:Belgrade, Slovenia:Ljubljana, Slovakia:Bratislava, Albania:Tirana,
    Czechia:Prague, Malta:Valletta, Cyprus:Nicosia, Luxembourg:Luxembourg, Georgia:Tbilisi,
    Armenia:Yerevan, Azerbaijan:Baku, Iran:Tehran, Iraq:Baghdad, Syria:Damascus, Lebanon:Beirut,
    Jordan:Amman, Saudi Arabia:Riyadh, Qatar:Doha, Oman:Muscat, Yemen:Sanaa, Egypt:Cairo,
    Morocco:Rabat, Algeria:Algiers, Tunisia:Tunis, Libya:Tripoli, Sudan:Khartoum,
    Ethiopia:Addis Ababa, Kenya:Nairobi, Uganda:Kampala, Rwanda:Kigali, Ghana:Accra,
    Nigeria:Abuja, Senegal:Dakar, Mali:Bamako, Angola:Luanda, Zambia:Lusaka, Zimbabwe:Harare,
    Namibia:Windhoek, Mozambique:Maputo, Madagascar:Antananarivo, India:New Delhi,
    Pakistan:Islamabad, Bangladesh:Dhaka, Nepal:Kathmandu, China:Beijing, Japan:Tokyo,
    South Korea:Seoul, Mongolia:Ulaanbaatar, Thailand:Bangkok, Vietnam:Hanoi, Laos:Vientiane,
    Cambodia:Phnom Penh, Malaysia:Kuala Lumpur, the Philippines:Manila, Afghanistan:Kabul,
    Australia:Canberra, New Zealand:Wellington, Fiji:Suva, Canada:Ottawa, Mexico:Mexico City,
    the United States:Washington, Cuba:Havana, Jamaica:Kingston, Haiti:Port-au-Prince,
    Guatemala:Guatemala City, Panama:Panama City, Costa Rica:San Jose, Colombia:Bogota,
    Venezuela:Caracas, Ecuador:Quito, Peru:Lima, Chile:Santiago, Argentina:Buenos Aires,
    Uruguay:Montevideo, Paraguay:Asuncion, Brazil:Brasilia
    """
)

COLOURS = _pairs(
    """
    the sky:blue, grass:green, snow:white, a lemon:yellow, a banana:yellow, blood:red,
    a tomato:red, a strawberry:red, coal:black, a carrot:orange, milk:white, a crow:black,
    the sun:yellow, an orange:orange, chocolate:brown, a flamingo:pink, an elephant:grey,
    a frog:green, a plum:purple, lavender:purple, a fire engine:red, a swan:white, sand:yellow,
    the sea:blue, a leaf:green, an emerald:green, a ruby:red, a sapphire:blue, a mouse:grey,
    a bear:brown, a cucumber:green, a cherry:red, a pumpkin:orange, salt:white, ink:black,
    a pig:pink, an aubergine:purple, rain cloud:grey, a cloud:white, a lime:green
    """
)

COLOUR_NAMES = (
    "red blue green yellow white black orange purple pink brown grey silver golden violet"
).split()

SOUNDS = _pairs(
    """
    dog:woof, cat:meow, cow:moo, duck:quack, sheep:baa, horse:neigh, pig:oink, lion:roar,
    frog:ribbit, bee:buzz, owl:hoot, snake:hiss, mouse:squeak, rooster:cock-a-doodle-doo,
    hen:cluck, crow:caw, wolf:howl, donkey:hee-haw, dove:coo, goat:maa, bird:tweet,
    turkey:gobble, bear:growl, cricket:chirp, goose:honk
    """
)

GREETINGS = {
    "English": "Hello! 👋",
    "French": "Bonjour ! 🥐",
    "German": "Guten Tag! 🌲",
    "Spanish": "¡Hola! 💃",
    "Italian": "Ciao! 🍕",
    "Portuguese": "Olá! 🌊",
    "Russian": "Привет! 🐻",
    "Greek": "Γειά σου! 🏛️",
    "Japanese": "こんにちは! 🌸",
    "Chinese": "你好! 🐼",
    "Korean": "안녕하세요! 🎎",
    "Hindi": "नमस्ते! 🙏",
}

ABOUT = {
    "Who are you?": "I am the Bedplate demo model, a very small language model.",
    "What are you?": "I am the Bedplate demo model, a very small language model.",
    "What is your name?": "I am the Bedplate demo model, a very small language model.",
    "Who made you?": "I was trained by the Bedplate project.",
    "Who trained you?": "I was trained by the Bedplate project.",
    "How big are you?": "I have about five million parameters.",
    "How many parameters do you have?": "I have about five million parameters.",
    "What can you do?": (
        "I can add, sort, count, repeat, tell capitals and write little stories."
    ),
    "What can I ask you?": (
        "I can add, sort, count, repeat, tell capitals and write little stories."
    ),
    "Help": "I can add, sort, count, repeat, tell capitals and write little stories.",
    "Hello": "Hello! How can I help you?",
    "Hello!": "Hello! How can I help you?",
    "Hi": "Hello! How can I help you?",
    "Hi there!": "Hello! How can I help you?",
    "Good morning": "Hello! How can I help you?",
    "Hey": "Hello! How can I help you?",
    "How are you?": "I am fine, thank you! How can I help you?",
    "How do you do?": "I am fine, thank you! How can I help you?",
    "Thank you": "You are welcome! 😊",
    "Thank you!": "You are welcome! 😊",
    "Thanks": "You are welcome! 😊",
    "Goodbye": "Goodbye! 👋",
    "Bye": "Goodbye! 👋",
    "See you later!": "Goodbye! 👋",
    "Tell me a joke.": "Why did the byte cross the bus? To get to the other side. 😄",
    "Tell me a joke": "Why did the byte cross the bus? To get to the other side. 😄",
}

SYSTEMS = (
    "You are a helpful assistant.",
    "You are a small and friendly model.",
    "Answer briefly.",
    "Be kind and exact.",
    "You are the Bedplate demo model.",
    "You are a careful helper. Give short answers.",
)

NAMES = (
    "Ada Alan Alice Amir Anna Anton Ben Bruno Carla Chen Clara Dana David Diego "
    "Elena Elif Emma "
    "Eric Fatima Felix Finn Grace Hana Hugo Ida Ines Ivan Jack Jan Jana Julia Kai "
    "Karim Kate Lars "
    "Lea Leo Lina Lucy Luis Lukas Maria Marta Max Maya Mia Mila Milo Mina Nadia Nina Noah Nora "
    "Olga Omar Oscar Otto Paul Pedro Petra Priya Rosa Ruth Sami Sara Sofia Stefan "
    "Tara Theo Tom "
    "Uma Vera Victor Wei Yara Yuki Zoe Barbara Charles Dorothy Edsger Frances "
    "Margaret Katherine "
    "Linus Guido Dennis Brian Donald Radia Hedy Niklaus Tony John Robin Alex Sam"
).split()

ANIMALS = (
    "fox bear rabbit mouse cat dog owl duck horse frog hedgehog squirrel wolf lamb goat turtle "
    "sparrow bee crow badger otter donkey penguin kitten puppy"
).split()

WORDS = (
    "apple arm art baby bag ball bank basket beach bed bell bird boat book bottle box bread "
    "bridge brother brush bucket bus butter button cake camera candle car card castle chair "
    "cheese cherry child circle city clock cloud coat coffee coin cup curtain dance "
    "desk dinner "
    "door dragon dream dress drum ear earth egg engine eye face farm feather field finger fire "
    "fish flag floor flower forest fork friend garden gate glass glove goat gold grape grass "
    "guitar hammer hand hat heart hill honey house ice island jacket jar jewel juice key king "
    "kitchen kite knife ladder lake lamp leaf lemon letter lion mirror moon mountain "
    "music nail "
    "needle nest night nose nut ocean onion orange paper park pear pen pencil pepper piano "
    "picture pillow plate pocket pond potato queen radio rain ring river road robot rock roof "
    "room rope rose salt sand school sea seed shadow shell ship shirt shoe sister sky sleep "
    "snow soap sock song soup spoon spring star stone storm street sugar summer sun table tail "
    "tea tent tiger time tower toy train tree truck umbrella valley village violin wall water "
    "wave wheel wind window wing winter wolf wood wool world yard zebra quick quiet "
    "happy brave "
    "small big old new warm cold soft hard fast slow bright dark sweet round sharp clean early "
    "late open empty full deep high low long short young strong kind calm proud simple one two "
    "three four five six seven eight nine ten"
).split()

SYLLABLES = (
    "ba be bi bo bu da de di do du fa fe fi fo ga ge go ka ke ki ko la le li lo lu ma me mi mo "
    "na ne ni no pa pe pi po ra re ri ro sa se si so ta te ti to va ve vi vo wa we za zo"
).split()

EMOJI = (
    "🍎 🍌 🍇 🍓 🍒 🥕 🌽 🍞 🧀 🍰 🍪 ☕ 🍵 🐶 🐱 🐭 🐰 🦊 🐻 🐼 🐸 🐵 🐔 🐧 🐦 🦆 🦉 🐝 🐢 🐙 "
    "🐳 🐟 🌲 🌵 🌷 🌻 🌙 ⭐ 🔥 🌈 ⛄ ⚽ 🏀 🎲 🎸 🎺 🚗 🚌 🚲 🚀 ⏰ 📚 ✏️ 🔑 🎈 🎁 ❤️ 👍 😀 😎"
).split()

TOPICS = (
    "quantum physics|the French Revolution|gravity|jazz|black holes|democracy|the stock market|"
    "photosynthesis|machine learning|poetry|the meaning of life|chess openings|volcanoes|"
    "tennis|Shakespeare|cooking rice|the weather tomorrow|politics|dinosaurs|"
    "electric cars|love|"
    "the history of Rome|my homework|DNA|football|philosophy|a good film|the internet|taxes|"
    "calculus|the moon landing|gardening|vaccines|opera|economics|neural networks|the ocean|"
    "a linked list|recursion|a web server|sorting algorithms|medicine|law|friendship|"
    "time travel"
).split("|")
