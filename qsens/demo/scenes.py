"""What the captions are about: scenes, and the words that fit each of them. Data only.

Words stand in their base form, several in one string, with an underscore for a space inside a
term. The object of a verb carries a mark where the plain rule does not fit:

- ``umbrella``: counted with the subject, may take a colour ("two men carry red umbrellas");
- ``tree!``: shared by all subjects and plain ("two boys climb a tree");
- ``soup*``: taken as it is written ("a cook stirs soup").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Scene:
    """Subjects of one kind with what they look like, what they do and where.

    Attributes:
        subjects: Nouns.
        looks: Adjectives of the subjects.
        actions: Objects by verb; an empty string for a verb that takes none.
        places: Nouns by preposition.
        moods: Adjectives of the places.
        landmarks: Nouns to stand beside.
        people: Whether subjects wear and carry things.
        indoors: Whether there is no weather.
        company: Keys of `SCENES` whose subjects may be in the background.
    """

    subjects: str
    looks: str
    actions: dict[str, str]
    places: dict[str, str]
    moods: str
    landmarks: str
    people: bool = False
    indoors: bool = False
    company: tuple[str, ...] = ()


SCENES: Final[dict[str, Scene]] = {
    "street": Scene(
        subjects="woman man student tourist nurse teenager courier neighbor stranger lawyer",
        looks="young old tall busy tired elegant cheerful patient nervous",
        actions={
            "walk": "",
            "wait": "",
            "hurry": "",
            "wait for": "bus! tram! taxi! a_friend*",
            "carry": "suitcase umbrella basket box parcel ladder",
            "push": "cart stroller wheelchair",
            "ride": "bicycle scooter skateboard",
            "read": "map newspaper guidebook",
            "photograph": "statue! cathedral! parade!",
        },
        places={
            "on": "sidewalk bridge corner",
            "in": "square alley courtyard",
            "at": "crossing bus_stop",
            "outside": "station theater hotel bank pharmacy",
        },
        moods="busy quiet crowded sunny empty famous",
        landmarks="fountain statue lamp_post mailbox kiosk bench",
        people=True,
        company=("vehicles", "birds"),
    ),
    "park": Scene(
        subjects="boy girl child toddler",
        looks="little happy curious shy playful small noisy",
        actions={
            "laugh": "",
            "jump": "",
            "hide": "",
            "fly": "kite",
            "kick": "ball",
            "climb": "tree! wall! rock!",
            "chase": "butterfly! squirrel! pigeon!",
            "hold": "balloon flag lollipop",
            "throw": "frisbee ball pebbles*",
            "build": "a_snowman* a_fort* a_tower*",
            "eat": "ice_cream* popcorn* a_sandwich*",
            "feed": "ducks* pigeons*",
        },
        places={"in": "park playground garden meadow backyard schoolyard", "on": "lawn hill"},
        moods="green large sunny shady muddy grassy peaceful",
        landmarks="sandbox oak_tree picnic_table fence pond slide",
        people=True,
        company=("pets", "birds"),
    ),
    "market": Scene(
        subjects="vendor farmer shopper merchant grandmother customer",
        looks="friendly old busy smiling stout careful",
        actions={
            "sell": "bread* honey* cheese* flowers* spices* fresh_fish*",
            "weigh": "potatoes* grapes* onions* apples* walnuts*",
            "buy": "peaches* cabbages* olives* a_pumpkin*",
            "carry": "basket crate sack",
            "arrange": "lemons* jars* ripe_melons*",
            "count": "coins*",
        },
        places={
            "at": "market stall",
            "in": "square hall",
            "outside": "church town_gate",
        },
        moods="busy crowded colorful noisy large old",
        landmarks="cart barrel scale sign",
        people=True,
        company=("birds", "vehicles", "park"),
    ),
    "kitchen": Scene(
        subjects="cook baker chef waiter butcher",
        looks="young skilled busy cheerful tired careful",
        actions={
            "stir": "soup* sauce* batter*",
            "slice": "bread* tomatoes* carrots* mushrooms* a_cucumber*",
            "bake": "a_cake* a_pie* muffins*",
            "wash": "plates* dishes* pans* spoons*",
            "pour": "coffee* tea* milk* orange_juice*",
            "knead": "dough*",
            "fry": "eggs* noodles* fish*",
        },
        places={"in": "kitchen bakery restaurant diner", "behind": "counter"},
        moods="small bright crowded modern warm narrow",
        landmarks="stove oven sink cupboard refrigerator",
        people=True,
        indoors=True,
        company=("pets",),
    ),
    "farm": Scene(
        subjects="horse cow sheep goat donkey pony calf lamb",
        looks="brown white black spotted hungry gentle young muddy",
        actions={
            "graze": "",
            "rest": "",
            "stand": "",
            "trot": "",
            "eat": "hay* grass* clover*",
            "drink from": "bucket! trough! stream!",
            "look over": "gate! stone_wall!",
        },
        places={
            "in": "field pasture meadow orchard",
            "on": "hillside farm",
            "near": "barn stable cottage",
        },
        moods="green dry muddy sunny distant",
        landmarks="haystack barn wooden_fence gate windmill",
        company=("birds",),
    ),
    "pets": Scene(
        subjects="cat dog kitten puppy",
        looks="sleepy fluffy grey black orange small lazy striped",
        actions={
            "sleep": "",
            "nap": "",
            "yawn": "",
            "stretch": "",
            "play with": "ball ribbon slipper",
            "stare at": "goldfish* mirror! window!",
        },
        places={
            "on": "sofa rug carpet bed cushion",
            "under": "blanket quilt",
            "in": "basket armchair",
        },
        moods="soft warm worn patterned cozy",
        landmarks="bookshelf footstool floor_lamp radiator",
        indoors=True,
    ),
    "birds": Scene(
        subjects="gull sparrow crow heron duck swan goose owl robin parrot",
        looks="white small wet noisy hungry quiet lonely",
        actions={
            "rest": "",
            "call": "",
            "land": "",
            "look for": "seeds* worms* crumbs* insects*",
            "carry": "twig! berry!",
            "drink from": "puddle! birdbath!",
        },
        places={
            "on": "rooftop branch post pier chimney",
            "beside": "lake pond marsh",
            "near": "nest hedge",
        },
        moods="wet sunny snowy quiet small",
        landmarks="willow_tree rowboat stump reed_bed",
        company=("farm",),
    ),
    "wild": Scene(
        subjects="elephant zebra giraffe lion bear fox wolf deer rabbit",
        looks="large young wild cautious thirsty slender",
        actions={
            "rest": "",
            "run": "",
            "walk": "",
            "drink from": "river! waterhole!",
            "hide behind": "bush! boulder!",
            "sniff": "the_air* the_ground*",
        },
        places={
            "in": "forest valley clearing savanna",
            "at the edge of": "forest swamp plain",
            "on": "path ridge",
        },
        moods="quiet dusty misty rocky remote golden",
        landmarks="fallen_log termite_mound fig_tree boulder",
        company=("birds",),
    ),
    "vehicles": Scene(
        subjects="bus truck taxi van tractor tram motorcycle",
        looks="red yellow blue rusty dusty old empty white",
        actions={
            "stop": "",
            "turn": "",
            "wait": "",
            "pass": "church! cyclist! cemetery!",
            "carry": "passengers* logs* bricks* furniture* gravel*",
            "tow": "trailer caravan",
        },
        places={
            "on": "road highway bridge avenue",
            "in": "tunnel parking_lot",
            "at": "intersection traffic_light",
            "outside": "warehouse factory garage hospital",
        },
        moods="busy quiet large dark new distant",
        landmarks="billboard gas_pump toll_booth brick_wall",
        company=("street",),
    ),
    "boats": Scene(
        subjects="ferry canoe kayak sailboat barge ship",
        looks="small white blue wooden slow crowded",
        actions={
            "drift": "",
            "float": "",
            "arrive": "",
            "turn": "",
            "pass": "lighthouse! island! castle!",
            "carry": "crates* coal* visitors* barrels*",
        },
        places={
            "on": "lake river canal",
            "in": "harbor bay lagoon",
            "near": "dock island",
        },
        moods="calm foggy quiet windy sunny",
        landmarks="buoy lighthouse jetty sandbank",
        company=("birds", "shore"),
    ),
    "shore": Scene(
        subjects="fisherman sailor swimmer surfer lifeguard",
        looks="young old strong suntanned patient weary",
        actions={
            "swim": "",
            "rest": "",
            "mend": "net",
            "repair": "boat sail",
            "catch": "trout* crabs* a_salmon*",
            "watch": "the_waves* the_tide*",
            "coil": "rope",
            "collect": "shells* driftwood*",
        },
        places={
            "on": "beach pier dock",
            "at": "harbor marina",
            "beside": "river lagoon",
        },
        moods="calm quiet windy rocky deserted",
        landmarks="anchor beach_umbrella boathouse lookout_tower",
        people=True,
        company=("boats", "birds"),
    ),
    "library": Scene(
        subjects="student teacher librarian clerk scientist writer",
        looks="serious young quiet clever thoughtful tired",
        actions={
            "whisper": "",
            "read": "book magazine notebook",
            "write": "a_letter* a_report* a_poem*",
            "type on": "laptop typewriter",
            "study": "chart map",
            "draw": "a_diagram* a_portrait*",
            "sharpen": "pencil",
            "answer": "telephone! questions*",
        },
        places={"in": "library classroom office laboratory museum school"},
        moods="quiet modern dim spacious tidy",
        landmarks="globe bookcase whiteboard printer filing_cabinet desk",
        people=True,
        indoors=True,
        company=("pets",),
    ),
    "workshop": Scene(
        subjects="mechanic carpenter painter plumber electrician apprentice",
        looks="skilled young careful strong dusty patient",
        actions={
            "whistle": "",
            "repair": "engine! pump! radio clock",
            "paint": "door chair cabinet",
            "measure": "plank! window! shelf",
            "polish": "table mirror",
            "saw": "boards* timber*",
            "replace": "pipe! hinge! light_bulb!",
        },
        places={"in": "workshop garage shed basement"},
        moods="cluttered cold dusty bright large",
        landmarks="toolbox generator drill_press paint_can workbench",
        people=True,
        indoors=True,
        company=("pets", "library"),
    ),
    "stage": Scene(
        subjects="musician singer dancer performer magician",
        looks="talented young famous graceful nervous smiling",
        actions={
            "dance": "",
            "sing": "",
            "bow": "",
            "play": "guitar violin drum trumpet flute cello",
            "rehearse": "a_song* a_scene*",
            "tune": "guitar banjo",
            "juggle": "torches* oranges*",
        },
        places={"on": "stage platform", "in": "theater studio ballroom"},
        moods="dark large crowded brightly_lit grand",
        landmarks="curtain piano loudspeaker spotlight",
        people=True,
        indoors=True,
    ),
    "mountain": Scene(
        subjects="hiker climber skier ranger geologist",
        looks="brave tired young experienced lone cautious",
        actions={
            "rest": "",
            "climb": "cliff! slope! ridge!",
            "carry": "tent rope lantern",
            "admire": "glacier! sunset! rainbow!",
            "cross": "stream! snowfield!",
            "light": "a_campfire* a_stove*",
        },
        places={
            "on": "trail summit slope ledge",
            "in": "canyon valley gorge",
            "near": "cabin waterfall cave",
        },
        moods="snowy rocky remote narrow misty",
        landmarks="boulder pine_tree signpost waterfall",
        people=True,
        company=("birds", "wild"),
    ),
    "sport": Scene(
        subjects="player athlete runner goalkeeper coach referee",
        looks="fast young strong determined sweaty skinny",
        actions={
            "stretch": "",
            "train": "",
            "run": "",
            "kick": "ball!",
            "catch": "ball!",
            "swing": "racket bat",
            "lift": "trophy! weights*",
            "blow": "whistle!",
        },
        places={
            "in": "stadium arena",
            "on": "field court track",
            "beside": "pitch",
        },
        moods="large muddy crowded green floodlit",
        landmarks="goal scoreboard net referee_chair",
        people=True,
        company=("birds", "park"),
    ),
}

COLORS: Final = "red blue green yellow white black brown purple pink orange silver"
GARMENTS: Final = "coat hat jacket scarf shirt sweater cap vest sweatshirt raincoat"
LUGGAGE: Final = "backpack camera leather_bag thermos walking_stick"
QUANTITIES: Final = "two two three three four five six several a_few"

FRUIT: Final = "apple pear peach plum lemon banana fig"
FRUIT_LOOKS: Final = "ripe fresh green juicy yellow bruised"
VESSELS: Final = "cup bowl plate vase candle clock lamp teapot bottle jar pitcher"
VESSEL_LOOKS: Final = "glass ceramic copper porcelain tin clay blue white cracked empty tall round"
SURFACES: Final = "table shelf windowsill counter desk tray stool mantelpiece"
SURFACE_LOOKS: Final = "wooden marble dusty polished low cluttered narrow"
ROOMS: Final = "kitchen dining_room hallway bedroom studio attic"
ROOM_LOOKS: Final = "small bright dim tidy old sunlit"

RELATIONS: Final = "beside near behind next_to in_front_of close_to"
BACKGROUNDS: Final = "nearby in_the_background in_the_distance close_by not_far_away"
PARTS_OF_DAY: Final = "morning afternoon evening day"
SEASONS: Final = "winter summer spring autumn"
WEATHER: Final = "rainy foggy sunny windy cold warm cloudy humid stormy mild chilly"
HOURS: Final = "at_dawn at_noon at_dusk at_sunset in_the_early_morning in_the_late_afternoon"
SKIES: Final = "in_light_rain in_thick_fog after_the_storm under_a_cloudy_sky in_bright_sunlight"
INDOOR_HOURS: Final = "at_noon late_at_night before_breakfast after_lunch in_the_early_morning"
